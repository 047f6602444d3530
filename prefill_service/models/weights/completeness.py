"""Whether a checkpoint has every weight of its architecture, in the shape its configuration says.

transformers fills what is missing with random numbers and says so in a log; an answer would not
show it. The architecture is transformers' class, built on the meta device: no memory is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import ServiceError
from prefill_service.models.families.base import Family
from prefill_service.models.weights.quantization import FP8_DTYPE, FULL_PRECISION, SUPPORTED
from prefill_service.models.weights.refusal import refuse
from prefill_service.models.weights.safetensors_files import WEIGHTS, StoredTensor

ensure_torchvision()

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

_CONFIG = "config.json"


def check_complete(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    *,
    family: Family,
    model: str,
) -> None:
    """Compare the tensors of a checkpoint with what its architecture needs.

    Args:
        folder: of the checkpoint.
        config: its ``config.json``.
        tensors: what is stored, by name.
        family: of the checkpoint.
        model: as the operator named it, for errors.

    Raises:
        ServiceError: MODEL_INVALID, naming the first weight that is missing, has another shape or
            is not stored as floating-point numbers.
    """
    skeleton = _skeleton(folder, model)
    _check_architecture(config, type(skeleton).__name__, model)
    stored = {family.weight_name(name): (name, one) for name, one in tensors.items()}
    optional = _tied(skeleton, config)
    needed = {
        name: tuple(value.shape)
        for name, value in skeleton.state_dict().items()
        if name not in optional
    }
    missing = [name for name in needed if family.weight_name(name) not in stored]
    if missing:
        text = f"tensor {missing[0]!r} is missing ({len(missing)} of {len(needed)}){_hint(stored)}"
        raise refuse(model, _file(tensors), text, tensor=missing[0])
    for name, shape in needed.items():
        stored_name, one = stored[family.weight_name(name)]
        if one.dtype not in (*FULL_PRECISION, FP8_DTYPE):
            text = f"tensor {stored_name!r} is {one.dtype}; {SUPPORTED}"
            raise refuse(model, one.file, text, tensor=stored_name)
        if one.shape != shape:
            text = f"tensor {stored_name!r} has shape {list(one.shape)}"
            text += f", {_CONFIG} describes {list(shape)}"
            raise refuse(model, one.file, text, tensor=stored_name)


def _skeleton(folder: Path, model: str) -> Any:
    """transformers' model without memory."""
    classes: Any = AutoModelForImageTextToText
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return classes.from_config(config)
    except ServiceError:
        raise
    except Exception as error:  # whatever its classes raise for values they do not accept
        raise refuse(model, _CONFIG, f"transformers refuses it: {_first_line(error)}") from error


def _check_architecture(config: Mapping[str, Any], expected: str, model: str) -> None:
    """vLLM chooses its class by ``architectures``: another one has other weights or no answers."""
    named = config.get("architectures")
    if named != [expected]:
        text = f"architectures = {named!r}; expected ['{expected}']"
        raise refuse(model, _CONFIG, text, field="architectures")


def _tied(skeleton: Any, config: Mapping[str, Any]) -> set[str]:
    """Weights that need not be stored, because the configuration ties them to others."""
    if not config.get(
        "tie_word_embeddings", getattr(skeleton.config, "tie_word_embeddings", False)
    ):
        return set()
    return set(getattr(skeleton, "_tied_weights_keys", None) or ())


def _hint(stored: Mapping[str, object]) -> str:
    """What names of quantized or adapter weights say about how the file was made."""
    endings = {
        ".qweight": "GPTQ or AWQ",
        ".qzeros": "GPTQ or AWQ",
        ".weight_packed": "4-bit compressed-tensors",
        ".absmax": "bitsandbytes",
        ".lora_A.weight": "LoRA",
    }
    for ending, kind in endings.items():
        if any(name.endswith(ending) for name in stored):
            return f": the file has {kind} weights, {ending} and the like. {SUPPORTED}"
    return ""


def _file(tensors: Mapping[str, StoredTensor]) -> str:
    files = sorted({one.file for one in tensors.values()})
    return files[0] if len(files) == 1 else WEIGHTS.replace(".safetensors", "-*.safetensors")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
