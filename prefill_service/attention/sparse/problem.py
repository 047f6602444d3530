"""What a sparse attention is asked, and what it answers: the interface of both back ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from prefill_service.attention.sparse.hooks import BlockHooks
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseProblem:
    """Attention of a run of queries, of some KV heads of a layer.

    Attributes:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, keys, head_dim], at least ``tiles.keys`` keys.
        heads: [kv_heads] numbers of these KV heads in the layer, on the device of ``k``.
        summaries: of the first ``tiles.blocks`` blocks (at least).
        tiles: the queries' tiles.
        epsilon: [kv_heads] attention mass that selection may misplace.
        row_limit: [kv_heads] loss in one row from which a block is kept (``force_keep``).
        forced: [tiles, blocks] bool, blocks that every tile keeps (``forced_blocks``).
        scale: factor on the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: Tensor
    summaries: BlockSummaries
    tiles: Tiles
    epsilon: Tensor
    row_limit: Tensor
    forced: Tensor
    scale: float

    def of_heads(self, index: Tensor) -> SparseProblem:
        """The same for the KV heads at ``index``, with copies of their keys and values."""
        if len(index) == len(self.heads):
            return self
        return replace(
            self,
            q=by_kv_head(self.q, len(self.k))[index].flatten(0, 1),
            k=self.k[index],
            v=self.v[index],
            heads=self.heads[index],
            summaries=self.summaries.of_heads(index),
            epsilon=self.epsilon[index],
            row_limit=self.row_limit[index],
        )

    def stricter(self, factor: float) -> SparseProblem:
        """The same with ``factor`` times the epsilon and the row limit."""
        return replace(self, epsilon=factor * self.epsilon, row_limit=factor * self.row_limit)

    def strip(self, start: int, tokens: int) -> SparseProblem:
        """Queries [start, start + tokens), ``start`` being the first query of a tile."""
        q = self.q[:, start : start + tokens]
        tiles = replace(self.tiles, queries=q.shape[1], q_offset=self.tiles.q_offset + start)
        first = start // tiles.tile_tokens
        return replace(
            self,
            q=q,
            summaries=self.summaries.first(tiles.blocks),
            tiles=tiles,
            forced=self.forced[first : first + tiles.count, : tiles.blocks],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseResult:
    """Attention of some queries, and what was attended to.

    Attributes:
        out: [q_heads, queries, head_dim].
        lse: [q_heads, queries] natural log.
        keep: [kv_heads, tiles, blocks] bool, blocks attended exactly.
        bias: [kv_heads, tiles, blocks] logits of the summaries; -inf for kept blocks and for
            blocks that are no candidates.
        clock: seconds in "select" and "attend".
    """

    out: Tensor
    lse: Tensor
    keep: Tensor
    bias: Tensor
    clock: Stopwatch

    def of_heads(self, index: Tensor) -> SparseResult:
        """The part of the KV heads at ``index``."""
        kv_heads = len(self.keep)
        return SparseResult(
            out=by_kv_head(self.out, kv_heads)[index].flatten(0, 1),
            lse=by_kv_head(self.lse, kv_heads)[index].flatten(0, 1),
            keep=self.keep[index],
            bias=self.bias[index],
            clock=self.clock,
        )

    def attended(self, tiles: Tiles) -> Tensor:
        """[kv_heads] key columns, summed over the queries, on the host."""
        return attended_columns(self.keep, self.bias, tiles).cpu()


class SparseBackend(Protocol):
    """Sparse attention on one kind of device."""

    def attend_sparse(self, problem: SparseProblem, hooks: BlockHooks) -> SparseResult:
        """Attend with the fewest kept blocks that misplace an estimated ``epsilon`` of the mass.

        Args:
            hooks: called, once or more, with the blocks that are about to be read.
        """


def attended_columns(keep: Tensor, bias: Tensor, tiles: Tiles) -> Tensor:
    """[kv_heads] float64 key columns attended, summed over the queries (``SparseResult``)."""
    tokens = [tiles.tokens(tile) for tile in range(tiles.count)]
    per_query = keep.sum(-1) * tiles.block_tokens + (bias > -torch.inf).sum(-1)
    weights = torch.tensor(tokens, dtype=torch.float64, device=keep.device)
    return per_query.double() @ weights + tiles.local_keys


def by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """[q_heads, ...] as [kv_heads, queries_per_kv, ...] (a view)."""
    return x.view(kv_heads, -1, *x.shape[1:])
