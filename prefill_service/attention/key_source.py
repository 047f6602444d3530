"""Where the keys of a layer are: all on this rank, or, behind the same interface, on many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.settings import Segments
from prefill_service.attention.sparse.clustering import order_segments
from prefill_service.attention.sparse.hooks import BlockHooks, NoHooks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import SampledRows, Verification, verify_rows


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


class KeySource(BlockHooks, Protocol):
    """Keys and values for sparse attention. Buffers are [tokens, 2, kv_heads, head_dim]."""

    def prepare_keys(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        """Cluster what has become old, bring summaries up to date, have the local region here.

        Args:
            layer: whose keys.
            state: of the layer, updated.
            recent: tokens from here on are kept by place.
            tiles: of this rank's queries.
        """

    def verify_rows(
        self, problem: SparseProblem, result: SparseResult, sampled: SampledRows
    ) -> Verification:
        """Attend to the sampled rows exactly, and measure what ``result`` made of them."""


class ReplicatedKeys(NoHooks, KeySource):
    """All keys are here.

    Args:
        kv: [tokens, 2, kv_heads, head_dim] of one layer, complete up to the last query.
        segments: sizes.
        scratch: memory that all layers' verification shares; without it new memory is taken.
    """

    def __init__(
        self, kv: Tensor, segments: Segments, scratch: ScratchBuffers | None = None
    ) -> None:
        self._kv = kv
        self._segments = segments
        self._scratch = ScratchBuffers() if scratch is None else scratch

    @override
    def prepare_keys(self, layer: int, state: LayerState, recent: int, tiles: Tiles) -> None:
        # Rows are reordered in place.
        sizes = self._segments
        blocks = tiles.blocks
        k, v = self._kv.permute(1, 2, 0, 3)  # each [kv_heads, tokens, head_dim]
        start = state.clustered
        end = recent // sizes.segment_tokens * sizes.segment_tokens
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

    @override
    def verify_rows(
        self, problem: SparseProblem, result: SparseResult, sampled: SampledRows
    ) -> Verification:
        return verify_rows(problem, result, sampled, self._scratch)


def note_order(state: LayerState, start: int, end: int, order: Tensor) -> None:
    """Rows [start, end) are now those of ``order`` [kv_heads, end - start]."""
    if not start:
        # All layers begin with one tensor, the order of the prompt, which must not be written to.
        state.order = state.order.clone().int()
    state.order[:, start:end] = order
    state.clustered = end


def all_heads(k: Tensor) -> Tensor:
    """[kv_heads], the number of every KV head of [kv_heads, ...]."""
    return torch.arange(len(k), device=k.device)
