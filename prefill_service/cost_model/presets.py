"""Public models that can be planned for by name, without a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.model_shape import ModelShape

PRESETS: Mapping[str, ModelShape] = {
    "qwen2.5-vl-7b": ModelShape(
        name="Qwen2.5-VL-7B",
        num_layers=28,
        hidden=3584,
        intermediate=18944,
        q_heads=28,
        kv_heads=4,
        head_dim=128,
        dtype="bfloat16",
    ),
    "qwen3-vl-8b": ModelShape(
        name="Qwen3-VL-8B",
        num_layers=36,
        hidden=4096,
        intermediate=12288,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
        dtype="bfloat16",
    ),
}
"""Their language models, by name in lower case."""


def preset_shape(name: str) -> ModelShape:
    """The shape of a model by name.

    Raises:
        ServiceError: CONFIG_INVALID, naming the presets there are.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"preset {name!r} is not known; known are {', '.join(PRESETS)}",
            preset=name,
        ) from None
