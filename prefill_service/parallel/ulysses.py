"""A row of the mesh: its ranks swap tokens of all heads for all tokens of some (2309.14509)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.token_layout import Share


class UlyssesRow:
    """The all-to-alls of Ulysses among the ranks of this rank's row.

    Args:
        mesh: the ranks.
        heads: the partition of heads among the ranks of the row.
    """

    def __init__(self, mesh: SPMesh, heads: HeadSplit) -> None:
        self._mesh = mesh
        self._group = mesh.ulysses
        self._heads = heads
        self._counts = [0] * mesh.ulysses.size
        self._order = torch.empty(0, dtype=torch.long)
        self._inverse = self._order

    @property
    def kv_heads(self) -> slice:
        """KV heads of which this rank gets K and V."""
        return self._heads.keys(self._group.rank)

    @property
    def tokens(self) -> int:
        """Tokens of the chunk that the ranks of the row have together."""
        return sum(self._counts)

    def shares(self, chunk: tuple[Share, ...], member: int) -> list[Share]:
        """Shares of the ranks of one row, which has index ``member`` in its column."""
        return [chunk[self._mesh.world_rank(member, part)] for part in range(self._group.size)]

    def set_chunk(self, chunk: tuple[Share, ...], device: torch.device) -> None:
        """Set the chunk whose tokens are swapped: the share of every rank of the mesh."""
        row = self.shares(chunk, self._mesh.ring.rank)
        self._counts = [share.num_tokens for share in row]
        # Members' tokens one after the other, and the same in token order.
        tokens = np.array([t for share in row for a, b in share.ranges for t in range(a, b)], int)
        order = np.argsort(tokens)
        self._order = torch.from_numpy(order).to(device)
        self._inverse = torch.from_numpy(np.argsort(order)).to(device)

    def kv_to_heads(self, k: Tensor, v: Tensor, place: Tensor) -> None:
        """Own tokens' keys and values to all the row's, of this rank's heads.

        Args:
            k, v: [own tokens, kv_heads, head_dim].
            place: [the row's tokens in order, 2, own kv_heads, head_dim], filled.
        """
        kv = torch.stack([k, v], 1)  # [own tokens, 2, kv_heads, head_dim]
        if self._group.size == 1:
            place.copy_(kv)
            return
        arriving = [kv.new_empty((count, *place.shape[1:])) for count in self._counts]
        parts = range(self._group.size)
        self._group.all_to_all([kv[:, :, self._heads.keys(p)] for p in parts], arriving).wait()
        torch.index_select(torch.cat(arriving), 0, self._order, out=place)

    def to_heads(self, q: Tensor) -> Tensor:
        """[q_heads, own tokens, d] to [own heads, the row's tokens of the chunk in order, d]."""
        if self._group.size == 1:
            return q
        mine = self._heads.queries(self._group.rank)
        size = mine.stop - mine.start
        arriving = [q.new_empty((size, count, q.shape[2])) for count in self._counts]
        self._group.all_to_all(self._by_part(q), arriving).wait()
        return torch.cat(arriving, 1)[:, self._order]

    def to_tokens(self, out: Tensor) -> Tensor:
        """[own heads, the row's tokens in order, d] to [q_heads, own tokens, d]."""
        if self._group.size == 1:
            return out
        own = self._counts[self._group.rank]
        whole = out.new_empty((self._heads.q_heads, own, out.shape[2]))
        sent = torch.split(out[:, self._inverse], self._counts, 1)
        self._group.all_to_all(sent, self._by_part(whole)).wait()
        return whole

    def _by_part(self, x: Tensor) -> Sequence[Tensor]:
        """[q_heads, ...], the heads of each rank of the row (views)."""
        return [x[self._heads.queries(part)] for part in range(self._group.size)]
