"""One sparse attention of a run of queries: local region, selection, kept blocks, summaries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, attend_causal
from prefill_service.attention.sparse.cpu_backend import (
    GatherBuffers,
    kept_attention,
    local_attention,
)
from prefill_service.attention.sparse.selection import (
    Estimate,
    estimate,
    select,
    single_out,
    to_csr,
)
from prefill_service.attention.sparse.sharing import Share
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.summary_attention import (
    TINY_SHARE,
    attend_summaries,
    merge_with_summaries,
)
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stopwatch import Stopwatch

DENSE_ABOVE = 0.6
"""Density from which a KV head is attended densely on CPU: there gathering gains nothing."""


_MAX_SCORES = 1 << 22
"""Scores of summaries held at once (16 MiB): longer runs of queries are cut."""


@dataclass(frozen=True, slots=True)
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

    def heads(self, index: Tensor) -> SparseResult:
        """Of some KV heads."""
        out, lse = (
            x.view(len(self.keep), -1, *x.shape[1:])[index].flatten(0, 1)
            for x in (self.out, self.lse)
        )
        return SparseResult(out, lse, self.keep[index], self.bias[index], self.clock)

    def attended(self, tiles: Tiles) -> Tensor:
        """[kv_heads] key columns, summed over the queries (``LayerReport.attended``)."""
        return columns(self.keep, self.bias, tiles).cpu()


def columns(keep: Tensor, bias: Tensor, tiles: Tiles) -> Tensor:
    """[kv_heads] float64 key columns attended, summed over the queries; of [kv_heads, tiles, b]."""
    tokens = [tiles.tokens(tile) for tile in range(tiles.count)]
    per_query = keep.sum(-1) * tiles.block_tokens + (bias > -torch.inf).sum(-1)
    weights = torch.tensor(tokens, dtype=torch.float64, device=keep.device)
    return per_query.double() @ weights + tiles.local_keys


def previous_patch(patch_ends: np.ndarray, position: int | list[int]) -> np.ndarray:
    """First token of the temporal patch before the one that ``position`` lies in; 0 if none is.

    Args:
        patch_ends: [patches] one past each patch's last token.
    """
    own = np.searchsorted(patch_ends, position, side="right")
    starts: np.ndarray = np.where(own > 1, patch_ends[np.maximum(own, 2) - 2], 0)
    return starts


def forced_blocks(tiles: Tiles, sink_blocks: int, recent_from: list[int]) -> Tensor:
    """Blocks that every tile keeps: attention sinks and the temporal patch before its own.

    Args:
        sink_blocks: the first blocks of the prompt (StreamingLLM, arXiv 2309.17453).
        recent_from: [tiles] first token of the previous temporal patch.

    Returns:
        [tiles, blocks] bool; candidates only.
    """
    forced = torch.zeros(tiles.count, tiles.blocks, dtype=torch.bool)
    for tile in range(tiles.count):
        end = tiles.candidates(tile)
        forced[tile, : min(sink_blocks, end)] = True
        forced[tile, min(recent_from[tile] // tiles.block_tokens, end) : end] = True
    return forced


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summaries: BlockSummaries,
    tiles: Tiles,
    epsilon: Tensor,
    forced: Tensor,
    scale: float,
    buffers: GatherBuffers,
    fetch: Callable[[Tensor], None] | None = None,
    share: Share | None = None,
    row_limit: Tensor | None = None,
) -> SparseResult:
    """Attend with the fewest kept blocks that misplace an estimated ``epsilon`` of the mass.

    CUDA tensors go through the Triton kernels, others through SDPA over gathered blocks.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, keys, head_dim], at least ``tiles.keys`` keys.
        summaries: of the first ``tiles.blocks`` blocks (at least).
        epsilon: [kv_heads].
        forced: [tiles, blocks] bool (``forced_blocks``).
        scale: factor on the scores.
        fetch: called, once or more, with the [kv_heads, blocks] bool that are about to be read,
            of the first so many blocks; without it all are there.
        share: ``KeySource.share``, called once or more; not with CUDA tensors.
        row_limit: [kv_heads], see ``single_out``; without it rows have no say.
    """
    if row_limit is None:
        row_limit = torch.full_like(epsilon, torch.inf)
    known = summaries.first(tiles.blocks)
    if q.is_cuda:
        must = forced.to(q.device)
        return _with_kernels(q, k, v, known, tiles, epsilon, row_limit, must, scale, fetch)
    clock = Stopwatch(q.device)
    rows = tiles.tile_tokens * len(q)
    step = max(1, _MAX_SCORES // (rows * max(tiles.blocks, 1))) * tiles.tile_tokens
    parts = []
    for start in range(0, tiles.queries, step):
        part = q[:, start : start + step]
        run = replace(tiles, queries=part.shape[1], q_offset=tiles.q_offset + start)
        first = start // tiles.tile_tokens
        must = forced[first : first + run.count, : run.blocks]
        parts.append(_with_sdpa(part, k, v, known.first(run.blocks), run, epsilon, row_limit, must,
                                scale, buffers, clock, fetch, share))  # fmt: skip
    return parts[0] if len(parts) == 1 else _concatenated(parts, tiles.blocks)


def _concatenated(parts: list[SparseResult], blocks: int) -> SparseResult:
    def padded(x: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(x, (0, blocks - x.shape[-1]), value=value)

    return SparseResult(
        torch.cat([part.out for part in parts], 1),
        torch.cat([part.lse for part in parts], 1),
        torch.cat([padded(part.keep, False) for part in parts], 1),
        torch.cat([padded(part.bias, -torch.inf) for part in parts], 1),
        parts[0].clock,
    )


def _with_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: BlockSummaries,
    tiles: Tiles,
    epsilon: Tensor,
    row_limit: Tensor,
    forced: Tensor,
    scale: float,
    buffers: GatherBuffers,
    clock: Stopwatch,
    fetch: Callable[[Tensor], None] | None,
    share: Share | None,
) -> SparseResult:
    rows = tiles.pack(q, len(k))
    result = local_attention(rows, k, v, tiles, scale, buffers)
    clock.lap("attend")
    found = estimate(rows, result.lse, tiles, known, scale)
    epsilon = epsilon.to(found.loss.dtype)
    keep = select(single_out(found.loss, found.peak, row_limit.to(epsilon.dtype)), forced, epsilon)
    bias = found.bias.masked_fill(keep, -torch.inf)
    # A head that needs most of its keys is served faster, and exactly, by one dense call.
    dense = columns(keep, bias, tiles) > DENSE_ABOVE * tiles.causal_keys  # [kv_heads]
    keep[dense] = found.bias[dense] > -torch.inf
    bias[dense] = -torch.inf
    clock.lap("select")
    if fetch:
        fetch(keep.any(1))
        clock.lap("fetch")
    shared = share(rows, keep, tiles, columns(keep, bias, tiles)) if share else None
    here = shared.here if shared else keep
    if shared:
        dense[shared.heads] = False
    if tiles.blocks:
        result = _far(q, rows, k, v, known, tiles, scale, buffers, result, found, keep, here, dense)
    if shared:
        result = shared.add(result)
    out, lse = tiles.unpack(result.out, len(q)), tiles.unpack(result.lse, len(q))
    clock.lap("attend")
    return SparseResult(out, lse, keep, bias, clock)


def _far(
    q: Tensor,
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    known: BlockSummaries,
    tiles: Tiles,
    scale: float,
    buffers: GatherBuffers,
    local: Partial,
    found: Estimate,
    keep: Tensor,
    here: Tensor,
    dense: Tensor,
) -> Partial:
    """The local region's result, joined with all before it; of packed rows.

    The heads in ``dense`` [kv_heads] are attended to densely, the others through those of their
    kept blocks that are to be attended ``here``, and the summaries of the dropped ones.
    """
    if not dense.any():
        kept = kept_attention(rows, k, v, to_csr(here), tiles, scale, buffers)
        dropped = (found.bias > -torch.inf) & ~keep
        merged = merge_with_summaries(local, kept, found.attention, known.v_mean, dropped)
        if not (merged.lse - found.attention.lse < math.log(TINY_SHARE)).any():
            return merged
        # Estimates of kept blocks, so far above the truth that nothing true shows beside them.
        bias = found.bias.masked_fill(keep, -torch.inf)
        alone = attend_summaries(
            rows.to(bias.dtype), local.lse.to(bias.dtype), known.k_mean, bias, scale
        )
        return merge_with_summaries(local, kept, alone, known.v_mean, dropped)
    out, lse = torch.empty_like(local.out), torch.empty_like(local.lse)
    heads = dense.nonzero()[:, 0]
    grouped = q.reshape(len(k), -1, *q.shape[1:])
    keys, values = k[heads, : tiles.keys], v[heads, : tiles.keys]
    exact = attend_causal(grouped[heads].flatten(0, 1), keys, values, tiles.q_offset, scale)
    out[heads] = tiles.pack(exact.out, len(heads))
    lse[heads] = tiles.pack(exact.lse[..., None], len(heads))[..., 0]
    heads = (~dense).nonzero()[:, 0]
    if len(heads):
        part = _far(
            grouped[heads].flatten(0, 1), rows[heads], k[heads], v[heads], known.heads(heads),
            tiles, scale, buffers, Partial(local.out[heads], local.lse[heads]),
            found.heads(heads), keep[heads], here[heads], torch.zeros_like(dense[heads]),
        )  # fmt: skip
        out[heads], lse[heads] = part.out, part.lse
    return Partial(out, lse)


def _with_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    known: BlockSummaries,
    tiles: Tiles,
    epsilon: Tensor,
    row_limit: Tensor,
    forced: Tensor,
    scale: float,
    fetch: Callable[[Tensor], None] | None = None,
) -> SparseResult:
    # Triton is imported where it runs: without a GPU nothing needs it.
    from prefill_kernels.block_loss import estimate_loss
    from prefill_kernels.block_selection import select_blocks
    from prefill_kernels.block_sparse_attention import block_sparse_attention

    clock = Stopwatch(q.device)
    loss, peak, candidates = estimate_loss(
        q, k, known.k_mean, known.k_var, known.k_far, known.far_count,
        block_tokens=tiles.block_tokens,
        tile_tokens=tiles.tile_tokens, q_offset=tiles.q_offset, scale=scale,
    )  # fmt: skip
    epsilon = epsilon.float()
    csr, bias = select_blocks(
        single_out(loss, peak, row_limit.float()), candidates, forced, epsilon
    )
    keep = (bias == -torch.inf) & (candidates != -torch.inf)  # NaN is a candidate, and kept
    clock.lap("select")
    if fetch:
        fetch(keep.any(1))
        clock.lap("fetch")
    out, lse = block_sparse_attention(
        q, k, v, csr, block_tokens=tiles.block_tokens, tile_tokens=tiles.tile_tokens,
        q_offset=tiles.q_offset, scale=scale, summaries=(known.k_mean, known.v_mean), bias=bias,
    )  # fmt: skip
    clock.lap("attend")
    return SparseResult(out, lse, keep, bias, clock)
