"""Sparse attention on CPU: local region, selection, kept blocks, summaries, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention.dense import Partial, attend_causal
from prefill_service.attention.sparse.gathered_attention import (
    PackedTiles,
    kept_attention,
    local_attention,
)
from prefill_service.attention.sparse.hooks import BlockHooks, SelectedBlocks
from prefill_service.attention.sparse.problem import (
    SparseBackend,
    SparseProblem,
    SparseResult,
    attended_columns,
    by_kv_head,
)
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.selection import (
    Estimate,
    estimate,
    force_keep,
    select,
    to_csr,
)
from prefill_service.attention.sparse.summary_attention import (
    TINY_SHARE,
    attend_summaries,
    merge_with_summaries,
)
from prefill_service.attention.stopwatch import Stopwatch

DENSE_ABOVE = 0.6
"""Density from which a KV head is attended densely: there gathering gains nothing."""

_MAX_SCORES = 1 << 22
"""Scores of summaries held at once (16 MiB): longer runs of queries are cut."""


class CpuBackend(SparseBackend):
    """Blocks are gathered, and attended to in a few large calls.

    Args:
        dense_above: density from which a KV head is attended densely.
        max_scores: scores of summaries held at once.
    """

    def __init__(self, dense_above: float = DENSE_ABOVE, max_scores: int = _MAX_SCORES) -> None:
        self._dense_above = dense_above
        self._max_scores = max_scores
        self._scratch = ScratchBuffers()

    @override
    def attend_sparse(self, problem: SparseProblem, hooks: BlockHooks) -> SparseResult:
        clock = Stopwatch(problem.q.device)
        strips = [self._attend_strip(strip, hooks, clock) for strip in self._strips(problem)]
        return strips[0] if len(strips) == 1 else _joined(strips, problem.tiles.blocks)

    def _strips(self, problem: SparseProblem) -> Iterator[SparseProblem]:
        """Runs of whole tiles whose scores fit."""
        tiles = problem.tiles
        scores = tiles.tile_tokens * len(problem.q) * max(tiles.blocks, 1)
        tokens = max(1, self._max_scores // scores) * tiles.tile_tokens
        for start in range(0, tiles.queries, tokens):
            yield problem.strip(start, tokens)

    def _attend_strip(
        self, problem: SparseProblem, hooks: BlockHooks, clock: Stopwatch
    ) -> SparseResult:
        tiles = problem.tiles
        packed = PackedTiles(
            rows=tiles.pack(problem.q, len(problem.k)),
            k=problem.k,
            v=problem.v,
            tiles=tiles,
            scale=problem.scale,
        )
        result = local = local_attention(packed, self._scratch)
        clock.lap("attend")
        found = estimate(packed.rows, local.lse, problem.summaries, tiles=tiles, scale=packed.scale)
        keep, bias, dense = self._select(problem, found)
        clock.lap("select")
        hooks.fetch_blocks(keep.any(1), problem.heads)
        clock.lap("fetch")
        selected = SelectedBlocks(
            rows=packed.rows,
            keep=keep,
            tiles=tiles,
            pairs=attended_columns(keep, bias, tiles),
            heads=problem.heads,
        )
        delegated = hooks.delegate_blocks(selected)
        if delegated:
            dense[delegated.delegated_heads] = False
        if tiles.blocks:
            past = _Past(
                packed=packed,
                local=local,
                found=found,
                k_mean=problem.summaries.k_mean,
                v_mean=problem.summaries.v_mean,
                keep=keep,
                kept_here=delegated.kept_here if delegated else keep,
            )
            result = self._join_past(past, problem, dense)
        if delegated:
            result = delegated.merge_results(result)
        out = tiles.unpack(result.out, len(problem.q))
        lse = tiles.unpack(result.lse, len(problem.q))
        clock.lap("attend")
        return SparseResult(out=out, lse=lse, keep=keep, bias=bias, clock=clock)

    def _select(self, problem: SparseProblem, found: Estimate) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks to keep, bias of the others, and [kv_heads] bool, which are attended densely."""
        epsilon = problem.epsilon.to(found.loss.dtype)
        losses = force_keep(found.loss, found.peak, problem.row_limit.to(epsilon.dtype))
        keep = select(losses, problem.forced, epsilon)
        bias = found.bias.masked_fill(keep, -torch.inf)
        # A head that needs most of its keys is served faster, and exactly, by one dense call.
        columns = attended_columns(keep, bias, problem.tiles)
        dense = columns > self._dense_above * problem.tiles.causal_keys
        keep[dense] = found.bias[dense] > -torch.inf
        bias[dense] = -torch.inf
        return keep, bias, dense

    def _join_past(self, past: _Past, problem: SparseProblem, dense: Tensor) -> Partial:
        """The local region's result, joined with all before it; of packed rows.

        The KV heads in ``dense`` [kv_heads] attend to all keys, the others to kept blocks and
        summaries.
        """
        if not dense.any():
            return past.join_blocks(self._scratch)
        tiles = problem.tiles
        out = torch.empty_like(past.local.out)
        lse = torch.empty_like(past.local.lse)
        heads = dense.nonzero()[:, 0]
        exact = attend_causal(
            by_kv_head(problem.q, len(problem.k))[heads].flatten(0, 1),
            problem.k[heads, : tiles.keys],
            problem.v[heads, : tiles.keys],
            q_offset=tiles.q_offset,
            scale=problem.scale,
        )
        out[heads] = tiles.pack(exact.out, len(heads))
        lse[heads] = tiles.pack(exact.lse[..., None], len(heads))[..., 0]
        heads = (~dense).nonzero()[:, 0]
        if len(heads):
            part = past.of_heads(heads).join_blocks(self._scratch)
            out[heads] = part.out
            lse[heads] = part.lse
        return Partial(out, lse)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """All that is known when a strip's queries come to attend to what lies before them.

    Attributes:
        local: over the local region, of packed rows.
        found: what each candidate block was estimated to lose.
        k_mean, v_mean: [kv_heads, blocks, head_dim] of the blocks.
        keep: [kv_heads, tiles, blocks] bool, selected blocks.
        kept_here: [kv_heads, tiles, blocks] bool, those of them that this rank attends to itself.
    """

    packed: PackedTiles
    local: Partial
    found: Estimate
    k_mean: Tensor
    v_mean: Tensor
    keep: Tensor
    kept_here: Tensor

    def of_heads(self, index: Tensor) -> _Past:
        """The same for the KV heads at ``index`` (copies)."""
        return _Past(
            packed=self.packed.of_heads(index),
            local=Partial(self.local.out[index], self.local.lse[index]),
            found=self.found.of_heads(index),
            k_mean=self.k_mean[index],
            v_mean=self.v_mean[index],
            keep=self.keep[index],
            kept_here=self.kept_here[index],
        )

    def join_blocks(self, scratch: ScratchBuffers) -> Partial:
        """Local region, kept blocks and the summaries of the dropped ones in one softmax."""
        kept = kept_attention(self.packed, to_csr(self.kept_here), scratch)
        dropped = (self.found.bias > -torch.inf) & ~self.keep
        values = self.v_mean
        merged = merge_with_summaries(
            self.local, kept, self.found.attention, v_mean=values, dropped=dropped
        )
        if not (merged.lse - self.found.attention.lse < math.log(TINY_SHARE)).any():
            return merged
        # Estimates of kept blocks, so far above the truth that nothing true shows beside them.
        bias = self.found.bias.masked_fill(self.keep, -torch.inf)
        alone = attend_summaries(
            self.packed.rows.to(bias.dtype),
            self.local.lse.to(bias.dtype),
            self.k_mean,
            bias=bias,
            scale=self.packed.scale,
        )
        return merge_with_summaries(self.local, kept, alone, v_mean=values, dropped=dropped)


def _joined(strips: list[SparseResult], blocks: int) -> SparseResult:
    """The strips' results as one; masks are widened to ``blocks`` blocks."""

    def widen(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, blocks - x.shape[-1]), value=value)

    return SparseResult(
        out=torch.cat([strip.out for strip in strips], 1),
        lse=torch.cat([strip.lse for strip in strips], 1),
        keep=torch.cat([widen(strip.keep, False) for strip in strips], 1),
        bias=torch.cat([widen(strip.bias, -torch.inf) for strip in strips], 1),
        clock=strips[0].clock,
    )
