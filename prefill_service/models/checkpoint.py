"""A checkpoint on disk: found, checked for completeness, and fingerprinted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.fingerprint import fingerprint_model
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.model_config import ModelConfig, read_json
from prefill_service.models.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the service needs to know of a checkpoint without loading its weights.

    Attributes:
        path: local folder.
        family: ``model_type``, one of ``FAMILIES``.
        fingerprint: hash of configuration and weights (``kv.fingerprint``).
        shape: of the language model, with the dtype that its configuration names.
        max_position_embeddings: longest context.
    """

    path: Path
    family: str
    fingerprint: str
    shape: ModelShape
    max_position_embeddings: int


def open_checkpoint(model: str) -> Checkpoint:
    """Find ``model`` (a folder, or a hub id, which is downloaded) and check it.

    Raises:
        ServiceError: MODEL_INVALID, naming the missing file or the unsupported family.
    """
    if not model:
        raise ServiceError(Reason.MODEL_INVALID, "no model given: set engine.model or --model")
    path = Path(model).expanduser()
    if not path.is_dir():
        path = _download(model)
    config = ModelConfig.open(path, model)
    family = config.family
    if family not in FAMILIES:
        raise ServiceError(
            Reason.MODEL_INVALID,
            f"{model}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}",
            model=model,
            model_type=family,
        )
    _require_any(path, model, "tokenizer.json", "vocab.json")
    _require_any(
        path,
        model,
        "processor_config.json",
        "video_preprocessor_config.json",
        "preprocessor_config.json",
    )
    _check_weights(path, model)
    return Checkpoint(
        path=path.resolve(),
        family=family,
        fingerprint=fingerprint_model(path),
        shape=config.shape(),
        max_position_embeddings=config.size("max_position_embeddings"),
    )


def resolve_dtype(requested: str, checkpoint: Checkpoint, device: str) -> str:
    """``auto`` is the checkpoint's dtype on CUDA and float32 on CPU, where bf16 GEMMs crawl."""
    if requested != "auto":
        return requested
    return "float32" if device == "cpu" else checkpoint.shape.dtype


def resolve_device(requested: str) -> str:
    """``auto`` is cuda where torch finds one."""
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ServiceError(
            Reason.CONFIG_INVALID, "engine.device is cuda, but torch finds no CUDA device"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if requested == "auto" else requested


def _download(model: str) -> Path:
    if model.startswith(("/", ".", "~")):
        raise ServiceError(Reason.MODEL_INVALID, f"{model}: no such folder", model=model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model))
    except HFValidationError as error:
        raise ServiceError(
            Reason.MODEL_INVALID, f"{model}: neither a folder nor a hub id", model=model
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ServiceError(
            Reason.MODEL_INVALID,
            f"{model}: not a folder, and downloading it failed: {str(error).splitlines()[0]}",
            model=model,
        ) from error


def _missing(model: str, name: str) -> ServiceError:
    return ServiceError(
        Reason.MODEL_INVALID, f"{model}: file {name} is missing", model=model, file=name
    )


def _require_any(path: Path, model: str, *names: str) -> None:
    if not any((path / name).is_file() for name in names):
        raise _missing(model, " or ".join(names))


def _check_weights(path: Path, model: str) -> None:
    if (path / "model.safetensors").is_file():
        return
    if not (path / "model.safetensors.index.json").is_file():
        raise _missing(model, "model.safetensors or model.safetensors.index.json")
    index = read_json(path, "model.safetensors.index.json", model)
    for name in sorted(set(index.get("weight_map", {}).values())):
        if not (path / name).is_file():
            raise _missing(model, name)
