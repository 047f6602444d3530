"""Sizes of the keys and values that later chunks attend to, and what keeping them took."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OffloadShape:
    """Sizes of a working set.

    Attributes:
        layers: that attend.
        tokens: rows of each layer.
        kv_heads, head_dim: of a row, ``[2 (K, V), kv_heads, head_dim]``.
        dtype, device: where it is computed with.
    """

    layers: int
    tokens: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def row(self) -> tuple[int, int, int]:
        """K and V of one token of one layer."""
        return (2, self.kv_heads, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.row) * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer."""
        return self.tokens * self.row_bytes

    def empty(self, *sizes: int) -> Tensor:
        """An uninitialised tensor ``[*sizes, *row]`` on the device."""
        return torch.empty((*sizes, *self.row), dtype=self.dtype, device=self.device)


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """What a working set took.

    Attributes:
        high_water_bytes: most bytes that lay on the device at once.
        offloaded_bytes: bytes whose home is elsewhere at the end.
        moved_bytes: to and from there.
        stalled_s: seconds that computing waited for a layer.
    """

    high_water_bytes: int
    offloaded_bytes: int = 0
    moved_bytes: int = 0
    stalled_s: float = 0.0
