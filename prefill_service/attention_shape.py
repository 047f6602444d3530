"""Sizes of the attention of one prompt in one model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of a model's attention.

    Attributes:
        num_layers: layers that attend.
        num_tokens: tokens of the prompt.
        q_heads, kv_heads, head_dim: of each layer.
        scale: factor on the scores.
        dtype, device: of Q, K and V.
    """

    num_layers: int
    num_tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    device: torch.device

    @property
    def queries_per_kv(self) -> int:
        """Query heads that read one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def row(self) -> tuple[int, int, int]:
        """K and V of one token in one layer, ``[2 (K, V), kv_heads, head_dim]``."""
        return (2, self.kv_heads, self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return prod(self.row) * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of K and V of all tokens in one layer."""
        return self.num_tokens * self.row_bytes

    def empty(self, *sizes: int) -> Tensor:
        """An uninitialised tensor ``[*sizes, *row]`` on the device."""
        return torch.empty((*sizes, *self.row), dtype=self.dtype, device=self.device)
