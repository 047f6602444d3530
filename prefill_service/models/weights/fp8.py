"""FP8 weights of a checkpoint, made full precision again one tensor at a time.

An e4m3 weight has scales beside it: one for each block of rows and columns (``weight_scale_inv``,
the layout of DeepSeek-V3, arXiv 2412.19437 section 3.3, and of Qwen's FP8 checkpoints), or one for
each row or for all of it (``weight_scale``, compressed-tensors). The weight is the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from prefill_service.models.weights.quantization import FP8_DTYPE, Fp8Format
from prefill_service.models.weights.safetensors_files import StoredTensor


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """The float32 product of e4m3 weights and their scales.

    Args:
        weight: [rows, columns] e4m3.
        scale: [blocks of rows, blocks of columns]; the last block of a row or column may be
            smaller. Without ``block``: [rows, 1], [rows], [1] or no axis.
        block: rows and columns of a block; ``None`` for scales of rows or of the whole weight.
    """
    rows, columns = weight.shape
    out = weight.to(torch.float32)
    scale = scale.to(torch.float32)
    if block is None:
        return out.mul_(scale if scale.numel() == 1 else scale.reshape(rows, 1))
    height, width = block
    across = scale.repeat_interleave(width, dim=1)[:, :columns]  # [blocks of rows, columns]
    for index in range(scale.shape[0]):
        out[index * height : (index + 1) * height].mul_(across[index])
    return out


class DequantizedWeight:
    """A weight that is read and dequantized when it is indexed with ``[...]``, as transformers
    reads safetensors' own slices. Nothing is kept.

    Args:
        read: gives a stored tensor by its name.
        name, scale: stored names of the weight and of its scales; no ``scale`` for a weight that
            is stored in full precision.
        block: of ``dequantize``.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        name: str,
        scale: str | None,
        block: tuple[int, int] | None,
    ) -> None:
        self._read = read
        self._name = name
        self._scale = scale
        self._block = block

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        stored = self._read(self._name)
        if self._scale is None:
            return stored
        return dequantize(stored, self._read(self._scale), self._block)


def dequantized_weights(
    folder: Path, tensors: Mapping[str, StoredTensor], fp8: Fp8Format
) -> dict[str, DequantizedWeight]:
    """All weights of an FP8 checkpoint by name; each is read when it is indexed.

    Args:
        folder: of the checkpoint.
        tensors: what is stored in it, by name.
        fp8: how its configuration says that it is quantized.
    """
    files: dict[str, Any] = {
        file: safe_open(str(folder / file), framework="pt")
        for file in {tensor.file for tensor in tensors.values()}
    }

    def read(name: str) -> Tensor:
        stored: Tensor = files[tensors[name].file].get_tensor(name)
        return stored

    scales = {fp8.scale_name(name) for name, one in tensors.items() if one.dtype == FP8_DTYPE}
    return {
        name: DequantizedWeight(
            read, name, fp8.scale_name(name) if one.dtype == FP8_DTYPE else None, fp8.block
        )
        for name, one in tensors.items()
        if name not in scales and not fp8.is_activation_scale(name)
    }
