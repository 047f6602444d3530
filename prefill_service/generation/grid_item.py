"""The multimodal part of a request to vLLM: where the video is and its grid, but no pixels.

The item is what vLLM's ``encode_mm_kwargs_item`` would write, made without importing vLLM,
which costs seconds and is absent where the server is given by URL. A test reads it with
vLLM's own code.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np

from prefill_service.models.prefix_plan import PrefixPlan

_RAW_VIEW = 3  # vllm.v1.serial_utils.CUSTOM_TYPE_RAW_VIEW


def video_features(plan: PrefixPlan) -> dict[str, Any]:
    """The ``features`` object of ``/inference/v1/generate`` for a planned prefix.

    The item's hash is the prefix id, namespaced: vLLM's prefix cache keys the video's blocks
    by it, so that a second question finds them, and no real video can ever be taken for it.

    The placeholder covers only the video's first token. vLLM refuses items that are longer
    than its encoder cache, which nothing here uses; positions depend on the offset and the
    grid, and the hashes of later blocks on those of earlier ones.
    """
    offset, _ = plan.placeholder
    return {
        "mm_hashes": {"video": [f"prefill-service/{plan.prefix_id}"]},
        "mm_placeholders": {"video": [{"offset": offset, "length": 1}]},
        "kwargs_data": {"video": [_grid_only_item(plan)]},
    }


def _grid_only_item(plan: PrefixPlan) -> str:
    """What vLLM's model computes positions from, as a base64 ``MultiModalKwargsItem``."""
    item = {name: _element(array) for name, array in plan.vllm_fields.items()}
    return base64.b64encode(msgspec.msgpack.encode(item)).decode("ascii")


def _element(array: np.ndarray) -> dict[str, Any]:
    """A ``MultiModalFieldElem`` of a ``MultiModalBatchedField`` that stays on the CPU."""
    tensor = (str(array.dtype), array.shape, msgspec.msgpack.Ext(_RAW_VIEW, array.tobytes()))
    return {"data": tensor, "field": ("batched", {"keep_on_cpu": True})}
