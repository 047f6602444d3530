"""The ``gather`` exchange: each chunk's K and V travel once, to all ranks.

Every rank ends up with all keys and values (replicated KV), receiving
``2 * kv_heads * head_dim * bytes * tokens * (P-1)/P`` per layer, the minimum for exact
attention with replicated KV (LSS Transformer, arXiv 2311.02382; LASP-2H, arXiv 2502.07563).
A rank starts on the keys it has (past chunks, its own tokens) while the others' arrive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, attend, merge
from prefill_service.parallel.group import PendingSlice, SPGroup


class GatherExchange:
    """Replicated K/V of one prompt and the attention over it.

    One buffer per layer, ``[tokens, 2, kv_heads, head_dim]``: a rank's run of tokens is one
    contiguous slice, K and V fused, so it is sent from and received into its final place.

    Args:
        group: the ranks.
        num_layers: layers that attend.
        num_tokens: tokens of the prompt.
        kv_heads, head_dim, dtype, device: of K and V.
    """

    def __init__(
        self,
        group: SPGroup,
        num_layers: int,
        num_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._group = group
        shape = (num_tokens, 2, kv_heads, head_dim)
        self._kv = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._pending: list[list[PendingSlice]] = [[] for _ in range(num_layers)]
        self._ranges: list[tuple[int, int]] = []

    def start_chunk(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce a chunk: per rank, its tokens [start, end), contiguous over the ranks."""
        self._ranges = list(ranges)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put this rank's keys and values in place and send them off.

        Args:
            k, v: [tokens, kv_heads, head_dim] of this rank's share; empty if it has none.
        """
        self._wait(layer)  # what the chunk before left under way
        kv = self._kv[layer]
        start, end = self._ranges[self._group.rank]
        kv[start:end, 0] = k
        kv[start:end, 1] = v
        self._pending[layer] = self._group.broadcast_slices([kv[a:b] for a, b in self._ranges])

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Causal attention of this rank's queries over all tokens up to each of them.

        Args:
            q: [q_heads, tokens, head_dim] of this rank's share.

        Returns:
            [q_heads, tokens, head_dim].
        """
        start, end = self._ranges[self._group.rank]
        chunk_start = self._ranges[0][0]
        partials = [self._partial(layer, q, start, end, scale, causal=True)]
        if chunk_start:
            partials.append(self._partial(layer, q, 0, chunk_start, scale))
        if start > chunk_start:
            self._wait(layer, before_rank=self._group.rank)
            partials.append(self._partial(layer, q, chunk_start, start, scale))
        return merge(partials).out

    def complete(self, layer: int) -> Tensor:
        """The layer's buffer, complete up to this rank's last token of the chunk.

        Rows before the chunk may be reordered: nothing is received there any more, and dense
        attention over them needs no mask.

        Returns:
            [tokens, 2, kv_heads, head_dim]; rows after this rank's share may still be arriving.
        """
        self._wait(layer, before_rank=self._group.rank)
        return self._kv[layer]

    def finish(self) -> None:
        """Wait for everything still under way (also after an aborted chunk)."""
        for layer in range(len(self._kv)):
            self._wait(layer)

    def _partial(
        self, layer: int, q: Tensor, start: int, end: int, scale: float, causal: bool = False
    ) -> Partial:
        k, v = self._kv[layer][start:end].permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        return attend(q, k, v, causal=causal, scale=scale)

    def _wait(self, layer: int, before_rank: int | None = None) -> None:
        later = []
        for pending in self._pending[layer]:
            if before_rank is None or pending.source < before_rank:
                pending.wait()
            else:
                later.append(pending)
        self._pending[layer] = later
