"""A checkpoint's configuration: the shape that it describes, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefill_service.cost_model.presets import PRESETS, preset_shape
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.model_config import ModelConfig, open_shape
from prefill_service.models.model_shape import ModelShape

FLAT: dict[str, Any] = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "torch_dtype": "bfloat16",
}  # fmt: skip


def shape_of(name: str, config: dict[str, Any]) -> ModelShape:
    return ModelConfig.parse(name, config).shape()


def test_flat_and_nested_configurations() -> None:
    name = "Qwen2.5-VL-7B"
    assert shape_of(name, FLAT) == PRESETS["qwen2.5-vl-7b"]
    text = {key: value for key, value in FLAT.items() if key != "torch_dtype"}
    nested = {"dtype": "bfloat16", "text_config": text, "vision_config": {"hidden_size": 1}}
    assert shape_of(name, nested) == PRESETS["qwen2.5-vl-7b"]
    inside = {"text_config": {**text, "dtype": "bfloat16"}}  # as Qwen3-VL is published
    assert shape_of(name, inside) == PRESETS["qwen2.5-vl-7b"]


def test_defaults_of_configurations() -> None:
    config = {key: FLAT[key] for key in FLAT if key not in ("num_key_value_heads", "torch_dtype")}
    shape = shape_of("m", config)
    assert (shape.kv_heads, shape.head_dim, shape.bytes_per_element) == (28, 128, 4)


def test_a_folder_needs_its_config_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLAT | {"head_dim": 64}))
    assert open_shape(str(tmp_path)).head_dim == 64


def test_the_models_parameters_are_half_the_flops() -> None:
    """Qwen2.5-7B's layers have 6.53 G parameters (its public count without embeddings)."""
    shape = PRESETS["qwen2.5-vl-7b"]
    per_layer = (shape.linear_flops - 4 * shape.hidden * shape.kv_heads * shape.head_dim) / 27
    assert 28 * per_layer / 2 == pytest.approx(6.53e9, rel=1e-3)
    assert shape.attention_flops(28) == 27 * 4 * 28 * 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size = None; expected a number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0; expected a number of 1 or more"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"intermediate_size": "x"}, "intermediate_size = 'x'"),
        ({"num_key_value_heads": 5}, "28 query heads are no multiple of 5 KV heads"),
        ({"torch_dtype": "int4"}, "dtype = 'int4'; expected one of"),
        ({"text_config": 3}, "text_config = 3 is not an object"),
    ],
)
def test_bad_configurations_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ServiceError, match=message) as refused:
        shape_of("some/model", FLAT | change)
    assert refused.value.reason is Reason.MODEL_INVALID
    assert "some/model" in str(refused.value)


def test_missing_files_and_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"config.json: missing"):
        open_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ServiceError, match=r"config.json: is not a JSON object"):
        open_shape(str(tmp_path))
    with pytest.raises(ServiceError, match=r"preset 'gpt' is not known; known are qwen2.5-vl-7b, "):
        preset_shape("gpt")
    with pytest.raises(ValueError, match="num_layers = 0; expected 1 or more"):
        replace(PRESETS["qwen3-vl-8b"], num_layers=0)
    with pytest.raises(ValueError, match="intermediate = -1; expected 1 or more"):
        replace(PRESETS["qwen3-vl-8b"], intermediate=-1)
    with pytest.raises(ValueError, match="dtype = 'fp8'; expected one of float64, "):
        replace(PRESETS["qwen3-vl-8b"], dtype="fp8")
