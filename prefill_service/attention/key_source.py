"""Where the keys of a layer are: all on this rank, or, behind the same interface, on many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from prefill_service.attention.sparse.attend import SparseResult
from prefill_service.attention.sparse.clustering import order_segments
from prefill_service.attention.sparse.cpu_backend import GatherBuffers
from prefill_service.attention.sparse.sharing import Shared
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import Certificate, certify


@dataclass(frozen=True, slots=True)
class Segments:
    """How past keys are cut: segments are clustered, blocks are kept or dropped.

    Attributes:
        block_tokens: tokens per block.
        segment_tokens: tokens per segment, a power-of-two multiple of the block.
        fixed_tokens: first tokens of the prompt, whose blocks keep their place.
    """

    block_tokens: int
    segment_tokens: int
    fixed_tokens: int


@dataclass(slots=True)
class LayerState:
    """One layer's view of the keys: how far they are clustered, and where each came from.

    Attributes:
        summaries: of all complete blocks.
        order: [kv_heads, tokens], original position of each row of the buffer.
        clustered: rows before this one are in clustered order.
    """

    summaries: BlockSummaries
    order: Tensor
    clustered: int = 0


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a certificate is asked of.

    Attributes:
        tiles, scale: of the queries.
        heads: [n] KV heads that ``result``, q, k and v are of.
        sampled: [samples] queries to measure.
        weights: [samples, keys] for ``Certificate.weighted``, or nothing.
    """

    tiles: Tiles
    scale: float
    heads: Tensor
    sampled: Tensor
    weights: Tensor | None = None


class KeySource(Protocol):
    """Keys and values for sparse attention. Buffers are [tokens, 2, kv_heads, head_dim]."""

    def prepare(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        """Cluster what has become old, bring summaries up to date, have the local region here.

        Args:
            recent: tokens from here on are kept by place.
            tiles: of this rank's queries.
        """

    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        """Have blocks here: ``wanted`` is [len(heads), blocks] bool."""

    def share(
        self, rows: Tensor, keep: Tensor, tiles: Tiles, pairs: Tensor, heads: Tensor
    ) -> Shared | None:
        """Have other ranks attend to a part of what was selected, if they have less to do.

        Args:
            rows: [n, tiles, group * tile_tokens, head_dim] packed queries.
            keep: [n, tiles, blocks] bool.
            pairs: [n] all key columns attended, summed over the queries.
            heads: [n] KV heads that the others are of.
        """

    def certify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: SparseResult,
        summaries: BlockSummaries,
        asked: Measurement,
        buffers: GatherBuffers,
    ) -> Certificate:
        """See ``certificate.certify``."""


class ReplicatedKeys:
    """All keys are here.

    Args:
        kv: [tokens, 2, kv_heads, head_dim] of one layer, complete up to the last query.
        segments: sizes.
    """

    def __init__(self, kv: Tensor, segments: Segments) -> None:
        self._kv, self._segments = kv, segments

    def prepare(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        """See ``KeySource``; rows are reordered in place."""
        sizes, blocks = self._segments, tiles.blocks
        k, v = self._kv.permute(1, 2, 0, 3)  # each [kv_heads, tokens, head_dim]
        start, end = state.clustered, recent // sizes.segment_tokens * sizes.segment_tokens
        if end > start:
            fixed = 0 if start else sizes.fixed_tokens
            order = start + order_segments(
                k[:, start:end], sizes.block_tokens, sizes.segment_tokens, fixed
            )
            for head in range(len(k)):
                k[head, start:end] = k[head].index_select(0, order[head])
                v[head, start:end] = v[head].index_select(0, order[head])
            note_order(state, start, end, order)
        # Blocks after the clustered ones change once more when their segment is complete.
        if blocks * sizes.block_tokens > start:
            fresh = slice(start, blocks * sizes.block_tokens)
            found = summarize(k[:, fresh], v[:, fresh], sizes.block_tokens)
            state.summaries.put(start // sizes.block_tokens, found)

    def fetch(self, wanted: Tensor, heads: Tensor) -> None:
        """See ``KeySource``: they are."""

    def share(
        self, rows: Tensor, keep: Tensor, tiles: Tiles, pairs: Tensor, heads: Tensor
    ) -> Shared | None:
        """See ``KeySource``: there is nobody else."""
        return None

    def certify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: SparseResult,
        summaries: BlockSummaries,
        asked: Measurement,
        buffers: GatherBuffers,
    ) -> Certificate:
        """See ``KeySource``."""
        return certify(
            q, k, v, result, summaries, asked.tiles, asked.sampled, asked.weights, asked.scale,
            buffers,
        )  # fmt: skip


def note_order(state: LayerState, start: int, end: int, order: Tensor) -> None:
    """Rows [start, end) are now those of ``order`` [kv_heads, end - start]."""
    if not start:
        state.order = state.order.int()  # a copy of what all layers share
    state.order[:, start:end] = order
    state.clustered = end


def all_heads(k: Tensor) -> Tensor:
    """[kv_heads], every KV head of [kv_heads, ...]."""
    return torch.arange(len(k), device=k.device)
