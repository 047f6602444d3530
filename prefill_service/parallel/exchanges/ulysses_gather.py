"""The ``ulysses_gather`` exchange: Ulysses in the mesh's rows, ``gather`` in its columns.

An all-to-all turns a share of the tokens with all heads into all the row's tokens with a share of
the heads, as in ``usp``; but along a column K and V of those heads do not circulate: each goes to
all, once. So a rank ends up with every key of its heads, and may select among them. One row is
Ulysses, one column is ``gather``.

Bytes received per rank and layer of N tokens, in any number of chunks, with even shares and heads:
``(2 q_heads + 2 kv_heads) d e (N/P) (U-1)/U + 2 kv_heads d e N (R-1)/P``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.token_layout import Piece, Share
from prefill_service.parallel.ulysses import UlyssesRow
from prefill_service.parallel.unit_attention import UnitAttention


class UlyssesGatherExchange(Exchange):
    """All keys of this rank's KV heads, and the attention of its row's queries over them.

    Heads are cut between KV heads: their query heads select together. Ranks of a row beyond the KV
    heads have none.

    Args:
        mesh: the ranks.
        shape: of the model's attention.

    Raises:
        ValueError: the Ulysses degree exceeds the query heads.
    """

    def __init__(self, mesh: SPMesh, shape: PromptShape) -> None:
        split = HeadSplit(shape.q_heads, shape.kv_heads, mesh.ulysses.size, whole_kv_heads=True)
        self._columns = mesh.ring
        self._row = UlyssesRow(mesh, split)
        queries = split.queries(mesh.ulysses.rank)
        keys = self._row.kv_heads
        self._shape = replace(
            shape, q_heads=queries.stop - queries.start, kv_heads=keys.stop - keys.start
        )
        # The column's part: K and V, and queries, of this rank's heads.
        self._column = GatherExchange(mesh.ring, self._shape)

    @classmethod
    @override
    def build(cls, setup: ExchangeSetup) -> Self:
        return cls(setup.mesh, setup.shape)

    @property
    @override
    def local_kv_heads(self) -> slice:
        return self._row.kv_heads

    @override
    def start_chunk(self, chunk: tuple[Share, ...]) -> None:
        rows = tuple(
            _joined(self._row.shares(chunk, member)) for member in range(self._columns.size)
        )
        self._row.set_chunk(chunk, self._shape.device)
        self._column.start_chunk(rows)

    @override
    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        size = (self._row.tokens, 2, self._shape.kv_heads, self._shape.head_dim)
        kv = torch.empty(size, dtype=k.dtype, device=k.device)
        self._row.kv_to_heads(k, v, kv)
        self._column.store_kv(layer, *kv.unbind(1))

    @override
    def attend_exact(self, layer: int, q: Tensor) -> Tensor:
        q = self._row.to_heads(q)
        if len(q):  # there may be more ranks in a row than KV heads
            q = self._column.attend_exact(layer, q)
        return self._row.to_tokens(q)

    @override
    def attend_adaptive(self, layer: int, q: Tensor, attention: UnitAttention) -> Tensor:
        q = self._row.to_heads(q)
        if len(q):
            q = self._column.attend_adaptive(layer, q, attention)
        return self._row.to_tokens(q)

    @override
    def finish(self) -> None:
        self._column.finish()


def _joined(shares: list[Share]) -> Share:
    """Neighbouring shares of one piece each, as one."""
    pieces = [piece for share in shares for piece in share.pieces]
    if not pieces:
        return Share(())
    first = pieces[0]
    last = pieces[-1]
    return Share((Piece(first.first_patch, last.end_patch, first.start_token, last.end_token),))
