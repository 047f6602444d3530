"""Sizes of the attention of one prompt in one model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
