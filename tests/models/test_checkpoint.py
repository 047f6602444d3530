"""Folders that are not checkpoints are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))


def test_a_whole_checkpoint(folder: Path) -> None:
    opened = open_checkpoint(str(folder))
    shape = opened.shape
    assert opened.family == "qwen3_vl"
    assert (shape.num_layers, shape.q_heads, shape.kv_heads, shape.head_dim) == (4, 4, 2, 64)
    assert shape.dtype == "float32"


def test_the_dtype_may_be_named_in_the_texts_part(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    config["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(str(folder)).shape.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ServiceError, match=name) as caught:
        open_checkpoint(str(folder))
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ServiceError, match="model-00002-of-00002"):
        open_checkpoint(str(folder))


def test_another_architecture_is_named(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ServiceError, match="'llama' is not supported"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("model", ["", "/nowhere/at/all", "./nor/here"])
def test_no_such_folder(model: str) -> None:
    with pytest.raises(ServiceError) as caught:
        open_checkpoint(model)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_one_changed_weight_changes_the_fingerprint(folder: Path) -> None:
    before = open_checkpoint(str(folder)).fingerprint
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert open_checkpoint(str(folder)).fingerprint != before
