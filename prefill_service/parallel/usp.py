"""The ``ring``, ``ulysses``, ``usp`` and ``multi_ring`` exchanges: one scheme on a 2-D mesh.

Inside a row of the mesh an all-to-all turns a share of the tokens with all heads into all the
row's tokens with a share of the heads (Ulysses, arXiv 2309.14509); along a column K and V of
those heads circulate (USP, arXiv 2405.07719). One row is Ulysses, one column is ring attention.

A rank keeps K and V of its row's tokens and its own heads. Ulysses therefore moves each token
once, whatever the number of chunks; a ring moves all that is held again with every chunk, since
its ranks hold 1/R of the keys each, and is meant for few, large chunks.

Bytes received per rank and layer with one chunk of N tokens, even shares and heads:
``(2 q_heads + 2 kv_heads) d e (N/P) (U-1)/U + 2 kv_heads d e N (R-1)/P``.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from prefill_service.parallel.exchange import AttentionShape
from prefill_service.parallel.heads import HeadSplit
from prefill_service.parallel.layout import ChunkLayout, HeldTokens, Range, Share, join
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.ring import Circulate
from prefill_service.parallel.running import ChunkQueries


class UspExchange:
    """K/V of a row's tokens and this rank's heads, and the attention over all rows.

    Args:
        mesh: the ranks.
        layout: of the whole prompt.
        shape: of the model's attention.
        circulate: how K and V go round a column.
        whole_groups: see ``HeadSplit``; what sparse attention needs.

    Raises:
        ValueError: the Ulysses degree exceeds the query heads.
    """

    def __init__(
        self,
        mesh: SPMesh,
        layout: ChunkLayout,
        shape: AttentionShape,
        circulate: Circulate,
        whole_groups: bool = False,
    ) -> None:
        self._mesh, self._circulate = mesh, circulate
        self._heads = HeadSplit(shape.q_heads, shape.kv_heads, mesh.ulysses.size, whole_groups)
        self._held = HeldTokens(mesh.ring.size)
        mine = self._heads.keys(mesh.ulysses.rank)
        tokens = sum(
            share.num_tokens
            for chunk in layout.shares
            for share in self._row(chunk, mesh.ring.rank)
        )
        size = (tokens, 2, mine.stop - mine.start, shape.head_dim)
        self._kv = [
            torch.empty(size, dtype=shape.dtype, device=shape.device)
            for _ in range(shape.num_layers)
        ]
        self._device, self._scale = shape.device, shape.scale

    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        """See ``Exchange``."""
        ring = self._mesh.ring
        self._first_row = self._held.rows(ring.rank)
        self._ranges: list[Range] = []
        for member in range(ring.size):
            ranges = join(chain(*(share.ranges for share in self._row(chunk, member))))
            self._held.extend(member, ranges)
            if member == ring.rank:
                self._ranges = ranges
        row = self._row(chunk, ring.rank)
        self._counts = [share.num_tokens for share in row]
        # Members' tokens one after the other, and the same in token order.
        tokens = np.array([t for share in row for a, b in share.ranges for t in range(a, b)], int)
        order = np.argsort(tokens)
        self._order = torch.from_numpy(order).to(self._device)
        self._inverse = torch.from_numpy(np.argsort(order)).to(self._device)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See ``Exchange``."""
        ulysses, heads = self._mesh.ulysses, self._heads
        place = self._kv[layer][self._first_row : self._first_row + sum(self._counts)]
        kv = torch.stack([k, v], 1)  # [tokens, 2, kv_heads, head_dim]
        if ulysses.size == 1:
            place.copy_(kv)
            return
        arriving = [kv.new_empty((count, *place.shape[1:])) for count in self._counts]
        ulysses.all_to_all(
            [kv[:, :, heads.keys(part)] for part in range(ulysses.size)], arriving
        ).wait()
        torch.index_select(torch.cat(arriving), 0, self._order, out=place)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See ``Exchange``."""
        ring, part = self._mesh.ring, self._mesh.ulysses.rank
        queries = ChunkQueries(self.to_heads(q), self._ranges, self._heads, part, self._scale)
        own = self._kv[layer][: self._held.rows(ring.rank)]
        rows = [self._held.rows(member) for member in range(ring.size)]
        for arrived in self._circulate(ring, own, rows):
            queries.meet(arrived.kv, arrived.first, self._held, arrived.member)
            if arrived.member == ring.rank:
                queries.meet_own(own, self._held, ring.rank)
        return self.to_tokens(queries.result().out)

    def finish(self) -> None:
        """See ``Exchange``; nothing outlives a call here."""

    @property
    def whole_groups(self) -> bool:
        """See ``HeadSplit``."""
        return self._heads.whole_groups

    @property
    def kv_heads(self) -> slice:
        """Those of which this rank has K and V."""
        return self._heads.keys(self._mesh.ulysses.rank)

    def keys(self, layer: int) -> Tensor:
        """[tokens, 2, own kv_heads, head_dim] of the row's tokens, in prompt order."""
        return self._kv[layer]

    def to_heads(self, q: Tensor) -> Tensor:
        """[q_heads, own tokens, d] to [own heads, the row's tokens of the chunk in order, d]."""
        ulysses, heads = self._mesh.ulysses, self._heads
        if ulysses.size == 1:
            return q
        mine = heads.queries(ulysses.rank)
        arriving = [
            q.new_empty((mine.stop - mine.start, count, q.shape[2])) for count in self._counts
        ]
        ulysses.all_to_all(
            [q[heads.queries(part)] for part in range(ulysses.size)], arriving
        ).wait()
        return torch.cat(arriving, 1)[:, self._order]

    def to_tokens(self, out: Tensor) -> Tensor:
        """The reverse."""
        ulysses, heads = self._mesh.ulysses, self._heads
        if ulysses.size == 1:
            return out
        own = self._counts[ulysses.rank]
        whole = out.new_empty((heads.q_heads, own, out.shape[2]))
        ulysses.all_to_all(
            torch.split(out[:, self._inverse], self._counts, 1),
            [whole[heads.queries(part)] for part in range(ulysses.size)],
        ).wait()
        return whole

    def _row(self, chunk: tuple[Share, ...], member: int) -> list[Share]:
        """Shares of the ranks at a place of the ring."""
        size = self._mesh.ulysses.size
        return [chunk[self._mesh.world_rank(member, index)] for index in range(size)]
