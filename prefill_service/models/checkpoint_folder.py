"""Finds the folder of a checkpoint, or downloads it, and says what a folder is that is none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefill_service.errors import ServiceError
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.weights.quantization import quantization_of
from prefill_service.models.weights.refusal import refuse
from prefill_service.models.weights.safetensors_files import (
    INDEX,
    WEIGHTS,
    check_no_lfs_pointers,
    read_json,
)

CONFIG = "config.json"
_DTYPES = ("float32", "bfloat16", "float16")
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_PROCESSORS = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
)
_NEEDED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""Files of a hub repository that transformers and vLLM read."""

_SHAPES: tuple[tuple[str, str], ...] = (
    ("adapter_config.json", "an adapter (LoRA). Merge it into its base model, and serve that"),
    ("*.gguf", "GGUF. Serve the checkpoint that it was made from"),
    ("model_index.json", "a diffusers pipeline"),
    ("params.json", "in Mistral's own format"),
    ("snapshots/*/config.json", "the hub's cache. Give the folder in its snapshots/"),
    ("*/config.json", "a parent folder. Give the folder in it that has config.json"),
    (WEIGHTS, "weights without a configuration"),
    (INDEX, "weights without a configuration"),
)
"""What a folder without config.json may be, by a file in it."""


def find_folder(model: str, *, local_files_only: bool = False) -> Path:
    """The folder of ``model``: a path, or a hub id, which is downloaded unless it is in the cache.

    Args:
        model: as the operator names it.
        local_files_only: download nothing.

    Raises:
        ServiceError: MODEL_INVALID. Of a hub id the configuration is downloaded and judged first.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        kind = "GGUF is not supported; " if path.suffix == ".gguf" else ""
        raise refuse(model, "", f"is a file; {kind}expected the folder of a checkpoint")
    if model.startswith(("/", ".", "~")):
        raise refuse(model, "", "no such folder")
    return _download(model, local_files_only)


def _download(model: str, local_files_only: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        path = hf_hub_download(model, CONFIG, local_files_only=local_files_only)
        check_config(read_json(Path(path).parent, CONFIG, model), model)
        return Path(
            snapshot_download(
                model, allow_patterns=list(_NEEDED), local_files_only=local_files_only
            )
        )
    except ServiceError:
        raise
    except HFValidationError as error:
        raise refuse(model, "", "neither a folder nor a hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise refuse(model, "", f"not a folder, and downloading it failed: {reason}") from error


def check_folder(folder: Path, model: str) -> dict[str, Any]:
    """Look for the files that a checkpoint has beside its weights.

    Returns:
        Its ``config.json``.

    Raises:
        ServiceError: MODEL_INVALID, naming the file that is missing or not what it should be.
    """
    check_no_lfs_pointers(folder, model)
    if not (folder / CONFIG).is_file():
        raise refuse(model, CONFIG, f"missing{_kind(folder)}")
    config = read_json(folder, CONFIG, model)
    if (folder / "adapter_config.json").is_file():
        text = "an adapter is not applied. Merge it into the weights, or move it away"
        raise refuse(model, "adapter_config.json", text)
    for names in (_TOKENIZERS, _PROCESSORS):
        if not any((folder / name).is_file() for name in names):
            raise refuse(model, " or ".join(names), "missing")
    for path in sorted(folder.glob("*.json")):
        if path.name != "vocab.json" and path.name.endswith(("config.json", "tokenizer.json")):
            read_json(folder, path.name, model)
    return config


def check_config(config: Mapping[str, Any], model: str) -> None:
    """Judge what can be judged by ``config.json`` alone.

    Raises:
        ServiceError: MODEL_INVALID, naming the field and what is supported.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        text = f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        raise refuse(model, CONFIG, text, field="model_type", model_type=str(family))
    text_config = config.get("text_config", {})
    if not isinstance(text_config, Mapping):
        raise refuse(model, CONFIG, "text_config is not an object", field="text_config")
    for prefix, part in (("", config), ("text_config.", text_config)):
        for key in ("dtype", "torch_dtype"):
            dtype = part.get(key)
            if dtype is not None and dtype not in _DTYPES:
                text = f"{prefix}{key} = {dtype!r}; supported are {', '.join(_DTYPES)}"
                raise refuse(model, CONFIG, text, field=f"{prefix}{key}")
    quantization_of(config, model)


def _kind(folder: Path) -> str:
    """What the folder seems to be, for the message."""
    for pattern, kind in _SHAPES:
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return f", and {found.relative_to(folder)} is there: the folder is {kind}"
    return ": the folder is not a checkpoint"
