"""A checkpoint on disk: found, checked before anything is loaded, and fingerprinted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.fingerprint import fingerprint_model
from prefill_service.models.checkpoint_folder import check_config, check_folder, find_folder
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.model_config import ModelConfig
from prefill_service.models.model_shape import ModelShape
from prefill_service.models.weights.completeness import check_complete
from prefill_service.models.weights.quantization import (
    Fp8Format,
    check_quantized_tensors,
    quantization_of,
)
from prefill_service.models.weights.safetensors_files import read_tensors


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the service needs to know of a checkpoint without loading its weights.

    Attributes:
        path: local folder.
        family: ``model_type``, one of ``FAMILIES``.
        fingerprint: hash of configuration and weights (``kv.fingerprint``).
        shape: of the language model, with the dtype that its configuration names.
        max_position_embeddings: longest context.
        fp8: how its weights are quantized; ``None`` if they are not.
    """

    path: Path
    family: str
    fingerprint: str
    shape: ModelShape
    max_position_embeddings: int
    fp8: Fp8Format | None = None


def open_checkpoint(model: str, *, local_files_only: bool = False) -> Checkpoint:
    """Find ``model`` and check that it can be served; no weight is read.

    Args:
        model: a folder, or a hub id, which is downloaded.
        local_files_only: download nothing.

    Raises:
        ServiceError: MODEL_INVALID, naming the file, the field or tensor, and what is supported.
    """
    if not model:
        raise ServiceError(Reason.MODEL_INVALID, "no model given: set engine.model or --model")
    path = find_folder(model, local_files_only=local_files_only)
    config = check_folder(path, model)
    check_config(config, model)
    family = FAMILIES[config["model_type"]]
    fp8 = quantization_of(config, model)
    tensors = read_tensors(path, model)
    check_quantized_tensors(tensors, fp8, model)
    check_complete(path, config, tensors, family=family, model=model)
    described = ModelConfig.parse(model, config)
    return Checkpoint(
        path=path.resolve(),
        family=family.model_type,
        fingerprint=fingerprint_model(path),
        shape=described.shape(),
        max_position_embeddings=described.size("max_position_embeddings"),
        fp8=fp8,
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
