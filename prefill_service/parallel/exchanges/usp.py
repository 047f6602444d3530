"""The ``ring``, ``ulysses``, ``usp`` and ``multi_ring`` exchanges: one algorithm on a 2-D mesh.

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
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.ring import Cycle, circulate, hamiltonian_cycles
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.online_softmax import OnlineSoftmax
from prefill_service.parallel.token_layout import ChunkLayout, HeldTokens, Range, Share, join
from prefill_service.parallel.ulysses import UlyssesRow
from prefill_service.parallel.unit_attention import UnitAttention


class UspExchange(Exchange):
    """K/V of a row's tokens and this rank's heads, and the attention over all rows.

    Args:
        mesh: the ranks.
        layout: of the whole prompt.
        shape: of the model's attention.

    Raises:
        ValueError: the Ulysses degree exceeds the query heads.
    """

    def __init__(self, mesh: SPMesh, layout: ChunkLayout, shape: PromptShape) -> None:
        self._mesh = mesh
        self._heads = HeadSplit(shape.q_heads, shape.kv_heads, mesh.ulysses.size)
        self._row = UlyssesRow(mesh, self._heads)
        self._held = HeldTokens(mesh.ring.size)
        mine = self._row.kv_heads
        tokens = sum(
            share.num_tokens
            for chunk in layout.shares
            for share in self._row.shares(chunk, mesh.ring.rank)
        )
        size = (tokens, 2, mine.stop - mine.start, shape.head_dim)
        self._kv = [
            torch.empty(size, dtype=shape.torch_dtype, device=shape.device)
            for _ in range(shape.attending_layers)
        ]
        self._device = shape.device
        self._scale = shape.scale
        # Of the chunk: the first row of K and V, and tokens of this rank's row and its own.
        self._first_row = 0
        self._ranges: list[Range] = []
        self._own_ranges: list[Range] = []

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup.mesh, setup.layout, setup.shape)

    def cycles(self) -> list[Cycle]:
        """The rings of a column, round which K and V go."""
        return [list(range(self._mesh.ring.size))]

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        ring = self._mesh.ring
        self._first_row = self._held.count(ring.rank)
        for member in range(ring.size):
            shares = self._row.shares(chunk, member)
            ranges = join(chain(*(share.ranges for share in shares)))
            self._held.extend(member, ranges)
            if member == ring.rank:
                self._ranges = ranges
        self._own_ranges = chunk[self._mesh.world.rank].ranges
        self._row.set_chunk(chunk, self._device)

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        end = self._first_row + self._row.tokens
        self._row.kv_to_heads(k, v, self._kv[layer][self._first_row : end])

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        ring = self._mesh.ring
        part = self._mesh.ulysses.rank
        queries = OnlineSoftmax(
            self._row.to_heads(q), self._ranges, heads=self._heads, part=part, scale=self._scale
        )
        own = self._kv[layer][: self._held.count(ring.rank)]
        rows = [self._held.count(member) for member in range(ring.size)]
        for arrived in circulate(ring, own, rows, self.cycles()):
            queries.attend_held(arrived.kv, arrived.first, self._held, arrived.member)
            if arrived.member == ring.rank:
                queries.attend_own(own, self._held, ring.rank)
        return self._row.to_tokens(queries.result().out)

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        attention.count_exact(layer, self._own_ranges)
        return self.attend_exact(layer, q)

    @override
    def finish(self) -> None:
        pass  # every transfer is waited for in the layer that started it


class MultiRingExchange(UspExchange):
    """The same with edge-disjoint rings in a column, where they are known, at once."""

    @override
    def cycles(self) -> list[Cycle]:
        ranks = self._mesh.ring.size
        return hamiltonian_cycles(ranks) if ranks > 1 else [[0]]
