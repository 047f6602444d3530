"""What an exchange is: how the queries of one rank meet the keys and values of all.

One more is a class with these four methods and an entry in ``exchanges.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prefill_service.parallel.token_layout import Share


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


class Exchange(Protocol):
    """Exact causal attention over the tokens of all ranks, chunk by chunk, layer by layer.

    All ranks make the same calls in the same order, also those without a share of a chunk: what
    one sends another waits for.
    """

    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        """Announce a chunk: the share of every rank. It lies after all chunks before."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take [tokens, kv_heads, head_dim] keys and values of this rank's share."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Causal attention of this rank's queries over all tokens up to each of them.

        Args:
            q: [q_heads, tokens, head_dim] of this rank's share.

        Returns:
            [q_heads, tokens, head_dim].
        """

    def finish(self) -> None:
        """Wait for everything still under way (also after an aborted chunk)."""
