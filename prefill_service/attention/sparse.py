"""One sparse attention of a run of queries: local region, selection, kept blocks, summaries."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from prefill_service.attention.block_sparse import GatherBuffers, far_attention, local_attention
from prefill_service.attention.dense import Partial
from prefill_service.attention.selection import estimate, select, to_csr
from prefill_service.attention.summaries import BlockSummaries
from prefill_service.attention.tiles import Tiles


@dataclass(frozen=True, slots=True)
class SparseResult:
    """Attention of some queries, and what was attended to.

    Attributes:
        out: [q_heads, queries, head_dim].
        lse: [q_heads, queries] natural log.
        keep: [kv_heads, tiles, blocks] bool, blocks attended exactly.
        bias: [kv_heads, tiles, blocks] logits of the summaries; -inf for kept blocks and for
            blocks that are no candidates.
        select_s, attend_s: seconds.
    """

    out: Tensor
    lse: Tensor
    keep: Tensor
    bias: Tensor
    select_s: float
    attend_s: float

    def attended(self, tiles: Tiles) -> Tensor:
        """[kv_heads] key columns, summed over the queries (``LayerReport.attended``)."""
        tokens = torch.tensor([tiles.tokens(t) for t in range(tiles.count)], dtype=torch.float64)
        columns = self.keep.sum(-1) * tiles.block_tokens + (self.bias > -torch.inf).sum(-1)
        return columns.cpu().double() @ tokens + tiles.local_keys


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
) -> SparseResult:
    """Attend with the fewest kept blocks that misplace an estimated ``epsilon`` of the mass.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, keys, head_dim], at least ``tiles.keys`` keys.
        summaries: of the first ``tiles.blocks`` blocks (at least).
        epsilon: [kv_heads].
        forced: [tiles, blocks] bool (``forced_blocks``).
        scale: factor on the scores.
    """
    start = time.perf_counter()
    rows = tiles.pack(q, len(k))
    local = local_attention(rows, k, v, tiles, scale, buffers)
    local_end = time.perf_counter()
    known = summaries.first(tiles.blocks)
    found = estimate(rows, local.lse, tiles, known, scale)
    keep = select(found.loss, forced, epsilon.to(found.loss.dtype))
    bias = found.bias.masked_fill(keep, -torch.inf)
    csr = to_csr(keep)
    selected = time.perf_counter()
    if tiles.blocks:
        far = far_attention(rows, k, v, csr, tiles, scale, buffers, known, bias)
        local = _join(local, far)
    out = tiles.unpack(local.out, len(q))
    lse = tiles.unpack(local.lse, len(q))
    end = time.perf_counter()
    return SparseResult(
        out, lse, keep, bias, selected - local_end, end - selected + local_end - start
    )


def _join(a: Partial, b: Partial) -> Partial:
    """``dense.merge`` of two parts in fewer passes: a convex combination of the outputs."""
    share = torch.sigmoid(b.lse - a.lse)
    share = torch.where(b.lse == -torch.inf, 0.0, share).to(a.out.dtype)
    return Partial(torch.lerp(a.out, b.out, share[..., None]), torch.logaddexp(a.lse, b.lse))
