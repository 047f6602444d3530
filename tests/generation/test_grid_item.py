"""Our bytes are vLLM's item."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from prefill_service.generation.grid_item import video_features
from prefill_service.models.prefix_plan import PrefixPlan


def make_plan(interval: float | None) -> PrefixPlan:
    fields = {"video_grid_thw": np.array([2, 8, 10])}
    if interval is not None:
        fields["second_per_grid_ts"] = np.array(interval, np.float32)
    return PrefixPlan(
        prefix_id="abc",
        family="qwen3_vl",
        token_ids=np.arange(100, dtype=np.int32),
        position_ids=np.zeros((3, 100), np.int64),
        position_delta=-3,
        frame_indices=np.arange(4),
        frame_seconds=np.arange(4) / 2.0,
        patch_grid=(2, 8, 10),
        resized_hw=(128, 160),
        patch_ends=np.array([50, 100]),
        placeholder=(5, 95),
        vllm_fields=fields,
        system_prompt="",
        video_token_id=7,
        num_video_tokens=40,
    )


@pytest.mark.parametrize("interval", [None, 0.5, 1 / 3])
def test_item_decodes_with_vllms_own_decoder(interval: float | None) -> None:
    from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import (
        decode_mm_kwargs_item,
        encode_mm_kwargs_item,
    )
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFieldElem,
        MultiModalKwargsItem,
    )

    field = MultiModalBatchedField(keep_on_cpu=True)
    values = {"video_grid_thw": torch.tensor([2, 8, 10])}
    if interval is not None:
        values["second_per_grid_ts"] = torch.tensor(interval)
    theirs = MultiModalKwargsItem(
        {name: MultiModalFieldElem(data=value, field=field) for name, value in values.items()}
    )
    features = video_features(make_plan(interval))
    ours = features["kwargs_data"]["video"][0]
    assert ours == encode_mm_kwargs_item(theirs)
    decoded = decode_mm_kwargs_item(ours)
    assert decoded.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(decoded[name].data, value)
        assert decoded[name].data.dtype == value.dtype
        assert decoded[name].field == field


def test_hash_is_the_namespaced_prefix_id() -> None:
    features = video_features(make_plan(None))
    assert features["mm_hashes"] == {"video": ["prefill-service/abc"]}
    assert features["mm_placeholders"] == {"video": [{"offset": 5, "length": 1}]}


def test_the_service_does_not_import_vllm() -> None:
    code = "import sys, prefill_service.generation.server; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
