"""transformers' model of a checkpoint, its weights in full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefill_service.compat import ensure_torchvision
from prefill_service.models.weights.fp8 import dequantized_weights
from prefill_service.models.weights.quantization import Fp8Format
from prefill_service.models.weights.refusal import refuse
from prefill_service.models.weights.safetensors_files import read_tensors

ensure_torchvision()

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402


def load_model(folder: Path, fp8: Fp8Format | None, **options: Any) -> Any:
    """Load a checkpoint that has been checked.

    transformers takes the weights one by one. Those of an FP8 checkpoint are dequantized as they
    are taken: no more float32 matrices exist beside the model than transformers has threads that
    read, four.

    Args:
        folder: of the checkpoint.
        fp8: how its weights are quantized; ``None`` if they are not.
        **options: of transformers' ``from_pretrained``.

    Raises:
        ServiceError: MODEL_INVALID if transformers finds no value for a weight: it would take
            random numbers.
    """
    models: Any = AutoModel
    options["output_loading_info"] = True
    if fp8 is None:
        model, found = models.from_pretrained(folder, **options)
    else:
        model, found = _load_dequantized(folder, fp8, options)
    missing = sorted(found["missing_keys"])
    if missing:
        text = f"tensor {missing[0]!r} is not found by transformers ({len(missing)} in all)"
        raise refuse(str(folder), "", text, tensor=missing[0])
    return model


def _load_dequantized(folder: Path, fp8: Fp8Format, options: dict[str, Any]) -> Any:
    """Model and loading information of an FP8 checkpoint."""
    models: Any = AutoModel
    config: Any = AutoConfig.from_pretrained(folder)
    del config.quantization_config  # transformers' own quantizer would need a GPU and accelerate
    with torch.device("meta"):
        model_class = type(models.from_config(config))
    weights = dequantized_weights(folder, read_tensors(folder, str(folder)), fp8)
    return model_class.from_pretrained(None, config=config, state_dict=weights, **options)
