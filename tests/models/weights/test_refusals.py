"""A folder that cannot be served is refused by file and field, whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from tests.models.weights.damage import (
    INDEX,
    WEIGHTS,
    as_fp8,
    edit_header,
    edit_json,
    edit_weights,
    split,
    write_raw_header,
)

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
Q_PROJ = "model.language_model.layers.1.self_attn.q_proj"
SHARD = "model-00002-of-00002.safetensors"
GROUP = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "format": "float-quantized",
}


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))


def refusal(folder: Path) -> tuple[str, dict[str, Any]]:
    """Message and metadata of the MODEL_INVALID that opening ends with."""
    with pytest.raises(ServiceError) as caught:
        open_checkpoint(str(folder))
    assert caught.value.reason is Reason.MODEL_INVALID
    return caught.value.message, dict(caught.value.metadata)


def compressed(**group: Any) -> dict[str, Any]:
    weights = {**GROUP["weights"], **group.pop("weights", {})}  # type: ignore[dict-item]
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {**GROUP, **group, "weights": weights}},
    }


QUANTIZED: dict[str, tuple[dict[str, Any], str, str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, "quant_method", "'awq'"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method", "'gptq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "quant_method", "'bitsandbytes'"),
    "modelopt": ({"quant_method": "modelopt"}, "quant_method", "'modelopt'"),
    "torchao": ({"quant_method": "torchao"}, "quant_method", "'torchao'"),
    "no method": ({"bits": 4}, "quant_method", "'None'"),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt", "'e5m2'"),
    "block": ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size", "[128]"),
    "static blocks": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
        "activation_scheme",
        "'static'",
    ),
    "ignored": (
        {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
        "modules_to_not_convert",
        "'lm_head'",
    ),
    "w4a16": (
        compressed(weights={"num_bits": 4, "type": "int", "strategy": "group"}),
        "config_groups.group_0.weights.num_bits",
        "4",
    ),
    "w8a8 integers": (
        compressed(weights={"type": "int"}),
        "config_groups.group_0.weights.type",
        "'int'",
    ),
    "packed": (
        compressed(format="pack-quantized"),
        "config_groups.group_0.format",
        "'pack-quantized'",
    ),
    "fp8 kv cache": (
        {**compressed(), "kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme",
        "{'num_bits': 8}",
    ),
    "2:4 sparse": (
        {**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}},
        "sparsity_config.format",
        "'sparse-24-bitmask'",
    ),
    "no groups": ({"quant_method": "compressed-tensors"}, "config_groups", "None"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantization_that_is_not_served(folder: Path, kind: str) -> None:
    entry, field, value = QUANTIZED[kind]
    edit_json(folder, "config.json", lambda config: config.update(quantization_config=entry))
    message, metadata = refusal(folder)
    name = f"quantization_config.{field}"
    assert f"config.json: {name} = {value} cannot be served; supported are float32" in message
    assert (metadata["file"], metadata["field"]) == ("config.json", name)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "llama"}, "'llama' is not supported; supported are qwen"),
    "no family": ({"model_type": None}, "model_type None is not supported"),
    "class": ({"architectures": ["Qwen3VLModel"]}, "expected ['Qwen3VLForConditionalGeneration']"),
    "no class": ({"architectures": None}, "architectures = None"),
    "dtype": ({"dtype": "float8_e4m3fn"}, "dtype = 'float8_e4m3fn'; supported are float32, bf"),
    "text": ({"text_config": [1]}, "text_config is not an object"),
    "place": ({"compression_config": {"format": "x"}}, "compression_config is not read; expected"),
    "shape": ({"vision_config": {"depth": "four"}}, "transformers refuses it: "),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_that_are_not_served(folder: Path, kind: str) -> None:
    change, text = CONFIGS[kind]
    edit_json(folder, "config.json", lambda config: config.update(change))
    message, metadata = refusal(folder)
    assert text in message
    assert metadata["file"] == "config.json"


FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]),
        WEIGHTS,
        "is truncated: ",
    ),
    "truncated in its header": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]),
        WEIGHTS,
        "is truncated: 500 bytes, its header alone takes ",
    ),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), WEIGHTS, "no safetensors file (0 bytes)"),
    "zeros": (lambda f: (f / WEIGHTS).write_bytes(bytes(4096)), WEIGHTS, "(4096 bytes)"),
    "longer": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"1234"),
        WEIGHTS,
        "bytes of tensors, its header describes ",
    ),
    "pickle": (lambda f: torch.save({}, f / WEIGHTS), WEIGHTS, "is a PyTorch or zip archive"),
    "page": (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html>"), WEIGHTS, "is an HTML page"),
    "gguf": (lambda f: (f / WEIGHTS).write_bytes(b"GGUF" + bytes(9)), WEIGHTS, "is a GGUF file"),
    "lfs weights": (lambda f: (f / WEIGHTS).write_text(LFS), WEIGHTS, "`git lfs pull`"),
    "lfs tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(LFS),
        "tokenizer.json",
        "is a Git LFS pointer",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "tokenizer.json",
        "cannot be read: ",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "tokenizer.json or vocab.json",
        "missing",
    ),
    "no processor": (
        lambda f: (f / "processor_config.json").unlink(),
        "processor_config.json or video_preprocessor_config.json or preprocessor_config.json",
        "missing",
    ),
    "key twice": (
        lambda f: (f / "config.json").write_text('{"model_type": "a", "model_type": "b"}'),
        "config.json",
        "key 'model_type' is there twice",
    ),
    "no object": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json",
        "is not a JSON object",
    ),
    "adapter beside": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json",
        "an adapter is not applied",
    ),
    "adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "config.json",
        "adapter_config.json is there: the folder is an adapter (LoRA). Merge it",
    ),
    "parent": (
        lambda f: [(f / "step-5").mkdir(), (f / "config.json").rename(f / "step-5/config.json")],
        "config.json",
        "step-5/config.json is there: the folder is a parent folder",
    ),
    "no checkpoint": (
        lambda f: [path.unlink() for path in f.iterdir()],
        "config.json",
        "missing: the folder is not a checkpoint",
    ),
    "only pytorch": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        WEIGHTS,
        "missing, the folder has pytorch_model.bin; supported are model.safetensors",
    ),
    "only gguf": (
        lambda f: (f / WEIGHTS).rename(f / "q4.gguf"),
        WEIGHTS,
        "missing, the folder has q4.gguf",
    ),
    "a second file": (
        lambda f: shutil.copy(f / WEIGHTS, f / "other.safetensors"),
        "other.safetensors",
        "vLLM would load it too",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_not_what_they_should_be(folder: Path, kind: str) -> None:
    damage, file, text = FILES[kind]
    damage(folder)
    message, metadata = refusal(folder)
    assert message.startswith(f"{folder}: {file}: ")
    assert text in message
    assert metadata["file"] == file


SHARDS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda f: (f / SHARD).unlink(), SHARD, "missing (1 of 2 files that model.safe"),
    "truncated": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
        SHARD,
        "is truncated",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), INDEX, "weight_map is not an object"),
    "outside": (
        lambda f: edit_json(f, INDEX, lambda index: index["weight_map"].update(a="../x")),
        INDEX,
        "weight_map names '../x', no file of this folder",
    ),
    "other tensor": (
        lambda f: edit_json(f, INDEX, lambda index: index["weight_map"].update(a=SHARD)),
        SHARD,
        "tensor 'a' is missing; model.safetensors.index.json names it",
    ),
    "both": (
        lambda f: shutil.copy(f / SHARD, f / WEIGHTS),
        WEIGHTS,
        "is beside model.safetensors.index.json, which does not name it",
    ),
    "twice": (
        lambda f: [
            shutil.copy(f / SHARD, f / "model-00003-of-00002.safetensors"),
            edit_json(
                f,
                INDEX,
                lambda index: index["weight_map"].update(a="model-00003-of-00002.safetensors"),
            ),
        ],
        "model-00003-of-00002.safetensors",
        f"is in {SHARD} too",
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_shards(folder: Path, kind: str) -> None:
    damage, file, text = SHARDS[kind]
    split(folder)
    open_checkpoint(str(folder))
    damage(folder)
    message, metadata = refusal(folder)
    assert text in message
    assert metadata["file"] == file


def test_files_that_only_one_reader_would_load(folder: Path) -> None:
    split(folder)
    shutil.copy(folder / SHARD, folder / "left-over.safetensors")
    open_checkpoint(str(folder))  # the index does not name it: nobody loads it
    (folder / "left-over.safetensors").rename(folder / "consolidated.safetensors")
    assert refusal(folder)[1]["file"] == "consolidated.safetensors"


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "dtype": (lambda h: h["lm_head.weight"].update(dtype="Q4"), "'lm_head.weight' has dtype 'Q4'"),
    "shape": (lambda h: h["lm_head.weight"].update(shape=[3, 3]), "of shape (3, 3), has "),
    "negative": (lambda h: h["lm_head.weight"].update(shape=[-1, 3]), "has shape (-1, 3)"),
    "gap": (lambda h: h.pop("lm_head.weight"), "begins at "),
    "no entry": (lambda h: h.update({"lm_head.weight": 1}), "broken safetensors header"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers(folder: Path, kind: str) -> None:
    change, text = HEADERS[kind]
    edit_header(folder, change)
    message, metadata = refusal(folder)
    assert "has a broken safetensors header: " in message
    assert text in message
    assert metadata["file"] == WEIGHTS


def test_a_tensor_twice_in_one_header(folder: Path) -> None:
    entry = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    write_raw_header(folder, f'{{"a": {entry}, "a": {entry}}}', b"")
    assert "key 'a' is there twice" in refusal(folder)[0]


WEIGHT_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (
        lambda w: w.pop(f"{Q_PROJ}.weight"),
        f"tensor '{Q_PROJ}.weight' is missing (1 of 122)",
    ),
    "shape": (
        lambda w: w.update({f"{Q_PROJ}.weight": torch.zeros(3, 256)}),
        f"'{Q_PROJ}.weight' has shape [3, 256], config.json describes [256, 256]",
    ),
    "integers": (
        lambda w: w.update({f"{Q_PROJ}.weight": torch.zeros(256, 256, dtype=torch.int8)}),
        f"'{Q_PROJ}.weight' is I8; supported are float32",
    ),
    "gptq": (
        lambda w: w.update({f"{Q_PROJ}.qweight": w.pop(f"{Q_PROJ}.weight")}),
        "the file has GPTQ or AWQ weights",
    ),
    "renamed": (
        lambda w: w.update({f"{Q_PROJ}.w": w.pop(f"{Q_PROJ}.weight")}),
        f"tensor '{Q_PROJ}.weight' is missing (1 of 122)",
    ),
    "untied head": (lambda w: w.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
    "fp8": (
        lambda w: as_fp8(w, f"{Q_PROJ}.weight"),
        f"'{Q_PROJ}.weight' is F8_E4M3, but config.json has no quantization_config",
    ),
}


@pytest.mark.parametrize("kind", WEIGHT_CHANGES)
def test_weights_that_the_architecture_does_not_have(folder: Path, kind: str) -> None:
    change, text = WEIGHT_CHANGES[kind]
    edit_weights(folder, change)
    message, metadata = refusal(folder)
    assert text in message
    assert metadata["file"] == WEIGHTS
    assert metadata["tensor"] in message


def test_a_tied_head_need_not_be_stored(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    edit_json(folder, "config.json", lambda config: config.update(tie_word_embeddings=True))
    open_checkpoint(str(folder))


def test_more_layers_than_are_stored(folder: Path) -> None:
    edit_json(
        folder, "config.json", lambda config: config["text_config"].update(num_hidden_layers=5)
    )
    message, metadata = refusal(folder)
    assert metadata["tensor"].startswith("model.language_model.layers.4.")
    assert "missing (11 of 133)" in message


def test_older_names_of_weights_are_accepted(checkpoint: Callable[..., Path]) -> None:
    opened = open_checkpoint(str(checkpoint("qwen2_5_vl")))  # "model.layers.0", "visual.blocks.0"
    assert opened.fp8 is None


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    message, _ = refusal(tmp_path / name)
    assert "is a file; " in message
    assert ("GGUF is not supported" in message) is name.endswith("gguf")
