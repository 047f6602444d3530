"""One CPU timing problem: the chunks of a prefill, which blocks a density keeps, and the truth.

The estimates compute with the product's own pieces what ``AdaptiveAttention`` will compute, so that
an epsilon can be found for every density beforehand, and others can be given the same mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import PATCH_GRID, synthetic
from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.quality import AttentionPolicy, Quality
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.clustering import order_segments
from prefill_service.attention.sparse.cpu_backend import DENSE_ABOVE
from prefill_service.attention.sparse.gathered_attention import PackedTiles, local_attention
from prefill_service.attention.sparse.problem import attended_columns
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.selection import (
    Estimate,
    estimate,
    force_keep,
    forced_blocks,
    previous_patch,
    select,
)
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import PromptShape, dtype_name

SETTINGS = SparseSettings(from_tokens=1)


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer's attention over a prompt, in chunks.

    Attributes:
        q: [q_heads, tokens, head_dim].
        kv: [tokens, 2, kv_heads, head_dim], in the order of the prompt.
        scale: factor on the scores.
        chunk: queries per chunk.
    """

    q: Tensor
    kv: Tensor
    scale: float
    chunk: int

    @property
    def tokens(self) -> int:
        return self.q.shape[1]

    @property
    def k(self) -> Tensor:
        """[kv_heads, tokens, head_dim]."""
        return self.kv[:, 0].transpose(0, 1)

    @property
    def v(self) -> Tensor:
        return self.kv[:, 1].transpose(0, 1)

    @property
    def patch_ends(self) -> np.ndarray:
        """[patches] one past each temporal patch's last token."""
        size = math.prod(PATCH_GRID)
        return np.append(np.arange(size, self.tokens, size), self.tokens)


def make(
    tokens: int, q_heads: int, kv_heads: int, *, head_dim: int, chunk: int, seed: int = 0
) -> Problem:
    """The mixture of structures; budgets then differ from tile to tile as they do in practice."""
    source = synthetic(
        "mixture", tokens, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, seed=seed
    )
    kv = torch.stack([source.k, source.v]).permute(2, 0, 1, 3).contiguous()
    return Problem(q=source.q, kv=kv, scale=source.scale, chunk=chunk)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk's estimates.

    Attributes:
        tiles: its queries.
        clustered: keys before this one are in clustered order.
        forced: [tiles, blocks] bool.
        found: losses and biases.
        summaries: of its candidate blocks.
    """

    tiles: Tiles
    clustered: int
    forced: Tensor
    found: Estimate
    summaries: BlockSummaries

    def keep(self, epsilon: float) -> Tensor:
        """[kv_heads, tiles, blocks] bool; as the product, dense where sparse would not pay."""
        budget = torch.full((len(self.found.loss),), epsilon, dtype=self.found.loss.dtype)
        keep = select(force_keep(self.found.loss, self.found.peak, budget / 2), self.forced, budget)
        dense = self.attended(keep) > DENSE_ABOVE * self.tiles.causal_keys
        keep[dense] = self.found.bias[dense] > -torch.inf
        return keep

    def attended(self, keep: Tensor) -> Tensor:
        """[kv_heads] key columns, summed over the queries."""
        return attended_columns(keep, self.found.bias.masked_fill(keep, -torch.inf), self.tiles)


@dataclass(frozen=True, slots=True)
class Estimates:
    """All chunks, and the keys and values [kv_heads, tokens, head_dim] in clustered order."""

    chunks: list[Chunk]
    k: Tensor
    v: Tensor

    def density(self, epsilon: float) -> float:
        """Attended over causal key columns."""
        attended = sum(float(chunk.attended(chunk.keep(epsilon)).mean()) for chunk in self.chunks)
        return attended / sum(chunk.tiles.causal_keys for chunk in self.chunks)

    def epsilon(self, density: float) -> float:
        """The epsilon whose density comes closest; for density 1 next to nothing."""
        low = -100.0
        high = 6.0  # powers of two; losses can add up to more than 1
        if density >= 1:
            return math.exp2(low)
        for _ in range(24):
            middle = (low + high) / 2
            if self.density(math.exp2(middle)) > density:
                low = middle
            else:
                high = middle
        ends = (math.exp2(low), math.exp2(high))
        return min(ends, key=lambda epsilon: abs(self.density(epsilon) - density))


def estimate_losses(problem: Problem) -> Estimates:
    """Estimate every chunk's losses."""
    block = SETTINGS.block_tokens
    segment = SETTINGS.segment_tokens
    k = problem.k
    v = problem.v
    ordered_k = k.clone()
    ordered_v = v.clone()
    whole = problem.tokens // segment * segment
    if whole:
        order = order_segments(k[:, :whole], block, segment, SETTINGS.sink_blocks * block)
        index = order[..., None].expand(-1, -1, k.shape[-1])
        ordered_k[:, :whole] = k.gather(1, index)
        ordered_v[:, :whole] = v.gather(1, index)
    end = problem.tokens // block * block
    raster = summarize(k[:, :end], v[:, :end], block)
    ordered = summarize(ordered_k[:, :end], ordered_v[:, :end], block)
    chunks = []
    for start in range(0, problem.tokens, problem.chunk):
        queries = min(problem.chunk, problem.tokens - start)
        tiles = Tiles(
            queries=queries, q_offset=start, tile_tokens=SETTINGS.tile_tokens, block_tokens=block
        )
        clustered = int(previous_patch(problem.patch_ends, start)) // segment * segment
        known = _join(ordered.first(clustered // block), raster.first(tiles.blocks))
        rows = tiles.pack(problem.q[:, start : start + queries], len(k))
        packed = PackedTiles(rows=rows, k=k, v=v, tiles=tiles, scale=problem.scale)
        local = local_attention(packed, ScratchBuffers())
        found = estimate(rows, local.lse, known, tiles=tiles, scale=problem.scale)
        chunks.append(
            Chunk(
                tiles=tiles,
                clustered=clustered,
                forced=_forced(problem, tiles),
                found=found,
                summaries=known,
            )
        )
    return Estimates(chunks, ordered_k, ordered_v)


def _join(first: BlockSummaries, all_blocks: BlockSummaries) -> BlockSummaries:
    """``first``, then the rest of ``all_blocks``."""
    begin = first.blocks
    return BlockSummaries(
        *(
            torch.cat([a, b[:, begin:]], 1)
            for a, b in zip(first.parts, all_blocks.parts, strict=True)
        )
    )


def _forced(problem: Problem, tiles: Tiles) -> Tensor:
    """The sink, and blocks from the previous temporal patch on."""
    first = [tiles.q_offset + tile * tiles.tile_tokens for tile in range(tiles.count)]
    recent = previous_patch(problem.patch_ends, first)
    return forced_blocks(tiles, SETTINGS.sink_blocks, recent.tolist())


def run(problem: Problem, epsilon: float, kv: Tensor) -> tuple[Tensor, LayerReport]:
    """The product: every chunk through ``AdaptiveAttention``, without a floor to meet.

    Args:
        kv: scratch like ``problem.kv``, overwritten: the product reorders it.

    Returns:
        [q_heads, tokens, head_dim], and the report with its times.
    """
    kv.copy_(problem.kv)
    attention = AdaptiveAttention(
        SETTINGS,
        AttentionPolicy(Quality.CUSTOM, epsilon, 0.0),
        PromptShape(
            num_layers=2,  # the last one does not attend
            num_tokens=problem.tokens,
            q_heads=len(problem.q),
            kv_heads=kv.shape[2],
            head_dim=kv.shape[3],
            scale=problem.scale,
            dtype=dtype_name(kv.dtype),
            device=kv.device,
        ),
        problem.patch_ends,
    )
    out = torch.empty_like(problem.q)
    for start in range(0, problem.tokens, problem.chunk):
        part = slice(start, min(start + problem.chunk, problem.tokens))
        out[:, part] = attention.attend_unit(0, problem.q[:, part], kv, start=start)
    return out, attention.stats.report().layers[0]


def reference(problem: Problem, made: Estimates, keeps: list[Tensor]) -> Tensor:
    """The same attention written out tile by tile, given each chunk's kept blocks; slow."""
    out = torch.empty_like(problem.q)
    group = len(problem.q) // len(made.k)
    block = SETTINGS.block_tokens
    for chunk, keep in zip(made.chunks, keeps, strict=True):
        k = torch.cat([made.k[:, : chunk.clustered], problem.k[:, chunk.clustered :]], 1)
        v = torch.cat([made.v[:, : chunk.clustered], problem.v[:, chunk.clustered :]], 1)
        for tile in range(chunk.tiles.count):
            first = chunk.tiles.q_offset + tile * chunk.tiles.tile_tokens
            part = slice(first, first + chunk.tiles.tokens(tile))
            begin = chunk.tiles.local_start(tile)
            seen = chunk.tiles.candidates(tile)
            causal = torch.arange(begin, part.stop) <= torch.arange(first, part.stop)[:, None]
            for head in range(len(k)):
                q = problem.q[head * group : (head + 1) * group, part] * problem.scale
                tokens = keep[head, tile, :seen].repeat_interleave(block)
                far = (q @ k[head, :begin].T).masked_fill(~tokens, -torch.inf)
                near = (q @ k[head, begin : part.stop].T).masked_fill(~causal, -torch.inf)
                bias = chunk.found.bias[head, tile, :seen]
                bias = bias.masked_fill(keep[head, tile, :seen], -torch.inf)
                mean = q @ chunk.summaries.k_mean[head, :seen].T + bias
                values = [v[head, : part.stop], chunk.summaries.v_mean[head, :seen]]
                p = torch.cat([far, near, mean], -1).softmax(-1)
                out[head * group : (head + 1) * group, part] = p @ torch.cat(values)
    return out
