"""The sizes of a language model that its prefill's cost depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefill_service.errors import Reason, ServiceError

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A language model with grouped-query attention and gated MLPs.

    A prefix needs no more of the last layer than its K and V, so one layer less attends, and
    exchanges anything, than the model has.

    Attributes:
        name: for people.
        layers, hidden, intermediate: of the language model.
        q_heads, kv_heads, head_dim: of its attention.
        bytes_per_element: of activations, K and V.

    Raises:
        ValueError: a size below 1, or query heads that are no multiple of the KV heads.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    bytes_per_element: int = 2

    def __post_init__(self) -> None:
        for size in (
            "layers", "hidden", "intermediate", "q_heads", "kv_heads", "head_dim",
            "bytes_per_element",
        ):  # fmt: skip
            if (value := getattr(self, size)) < 1:
                raise ValueError(f"{self.name}: {size} = {value}; expected 1 or more")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"{self.name}: {self.q_heads} query heads are no multiple of "
                f"{self.kv_heads} KV heads"
            )

    @property
    def attending_layers(self) -> int:
        """Layers whose attention is computed."""
        return self.layers - 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_element

    @property
    def partial_bytes(self) -> int:
        """Bytes of one token's partial attention result in one layer, its log-sum-exp included."""
        lse = max(4, self.bytes_per_element)  # sums of exponentials do not survive bfloat16
        return self.q_heads * (self.head_dim * self.bytes_per_element + lse)

    @property
    def linear_flops(self) -> int:
        """FLOPs per token in linear layers, over all layers."""
        keys_values = 4 * self.hidden * self.kv_heads * self.head_dim
        queries_out = 4 * self.hidden * self.q_heads * self.head_dim
        mlp = 6 * self.hidden * self.intermediate
        return self.layers * keys_values + self.attending_layers * (queries_out + mlp)

    def attention_flops(self, heads: int) -> int:
        """FLOPs per (query, key) pair of ``heads`` query heads, over all layers."""
        return self.attending_layers * 4 * heads * self.head_dim


PRESETS: Mapping[str, ModelShape] = {
    "qwen2.5-vl-7b": ModelShape(
        name="Qwen2.5-VL-7B",
        layers=28,
        hidden=3584,
        intermediate=18944,
        q_heads=28,
        kv_heads=4,
        head_dim=128,
    ),
    "qwen3-vl-8b": ModelShape(
        name="Qwen3-VL-8B",
        layers=36,
        hidden=4096,
        intermediate=12288,
        q_heads=32,
        kv_heads=8,
        head_dim=128,
    ),
}
"""Public configurations, in bfloat16."""


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


def shape_from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a checkpoint's ``config.json`` describes, nested or flat.

    Raises:
        ServiceError: MODEL_INVALID, naming the entry that is missing or not accepted.
    """
    text = config.get("text_config") or config
    if not isinstance(text, Mapping):
        raise _invalid(name, f"text_config = {text!r} is not an object")

    def size(key: str, default: int | None = None) -> int:
        value = text.get(key, default)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _invalid(name, f"{key} = {value!r}; expected a number of 1 or more")
        return value

    named = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    dtype = next(filter(None, named), "float32")
    if dtype not in _DTYPE_BYTES:
        raise _invalid(name, f"dtype = {dtype!r}; expected one of {', '.join(_DTYPE_BYTES)}")
    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    try:
        return ModelShape(
            name=name,
            layers=size("num_hidden_layers"),
            hidden=hidden,
            intermediate=size("intermediate_size"),
            q_heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            bytes_per_element=_DTYPE_BYTES[dtype],
        )
    except ValueError as error:
        raise ServiceError(Reason.MODEL_INVALID, str(error), model=name) from error


def open_shape(model: str) -> ModelShape:
    """The shape of a checkpoint's folder. Needs its ``config.json`` only, no weights.

    Raises:
        ServiceError: MODEL_INVALID, if that file is missing or says something else.
    """
    path = Path(model).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _invalid(model, f"config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise _invalid(model, "config.json is not a JSON object")
    return shape_from_config(Path(model).name or model, config)


def _invalid(model: str, text: str) -> ServiceError:
    return ServiceError(Reason.MODEL_INVALID, f"{model}: {text}", model=model)
