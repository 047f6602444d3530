"""Token-adaptive attention of one prefill on one rank: exact while short, then sparse, measured.

Keys and values live in one buffer per layer. Once a segment lies before all that a query keeps by
place, its rows are put in clustered order, in place; dense attention may go on using it, since it
needs no mask there. Each sparse attention is certified on sampled rows, and KV heads that miss
the floor are computed again with a smaller epsilon, then densely.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.block_sparse import GatherBuffers
from prefill_service.attention.certificate import (
    Certificate,
    certify,
    exact_rows,
    sample_rows,
    visible_mass,
)
from prefill_service.attention.clock import Stopwatch
from prefill_service.attention.clustering import order_segments
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.observe import BlockGrids, PatchMass
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import LayerReport, RankAttention
from prefill_service.attention.sparse import (
    SparseResult,
    forced_blocks,
    previous_patch,
    sparse_attention,
)
from prefill_service.attention.summaries import BlockSummaries, empty_summaries, summarize
from prefill_service.attention.tiles import Tiles

_RETRY_FACTORS = (0.25, 0.0625)
_SAMPLE_EVERY = 256
_MAX_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """Sizes of sparse attention.

    Attributes:
        from_tokens: queries that see fewer keys are computed exactly.
        block_tokens: tokens per key block.
        tile_tokens: tokens per query tile, a multiple of the block.
        segment_blocks: blocks per clustered segment, a power of two.
        sink_blocks: first blocks of the prompt that every tile keeps; at most a segment.
    """

    from_tokens: int
    block_tokens: int = 64
    tile_tokens: int = 128
    segment_blocks: int = 16
    sink_blocks: int = 1

    @property
    def segment_tokens(self) -> int:
        """Tokens per clustered segment."""
        return self.block_tokens * self.segment_blocks


@dataclass(slots=True)
class _LayerState:
    """One layer's view of the keys: how far they are clustered, and where each came from."""

    summaries: BlockSummaries
    order: Tensor  # [kv_heads, tokens], original position of each row of the buffer
    clustered: int = 0  # rows before this one are in clustered order


class AdaptiveAttention:
    """Attention and its measurements for all layers of one prefill.

    Args:
        settings: sizes.
        policy: the request's epsilon and floor.
        layers: layers that attend.
        kv_heads, head_dim, dtype, device: of K and V.
        patch_ends: [patches] one past each temporal patch's last token.
    """

    def __init__(
        self,
        settings: SparseSettings,
        policy: AttentionPolicy,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        patch_ends: np.ndarray,
    ) -> None:
        self._settings, self._policy = settings, policy
        self._patch_ends = patch_ends
        tokens = int(patch_ends[-1])
        self._reports = [LayerReport(layer, [0.0] * kv_heads) for layer in range(layers)]
        self._patch_mass = PatchMass(patch_ends, device)
        self._grids = BlockGrids(layers, kv_heads, tokens)
        self._buffers = GatherBuffers()
        blocks = tokens // settings.block_tokens if self._sparse_at(tokens) else 0
        raster = torch.arange(tokens, device=device).expand(kv_heads, -1)
        self._states = [
            _LayerState(empty_summaries(kv_heads, blocks, head_dim, dtype, device), raster)
            for _ in range(layers)
        ]

    def is_sparse(self, start: int, queries: int) -> bool:
        """Whether queries [start, start + queries) are to go through ``attend``."""
        return queries > 0 and self._sparse_at(start + queries)

    def attend(
        self, layer: int, q: Tensor, kv: Tensor, start: int, chunk_start: int, scale: float
    ) -> Tensor:
        """Sparse causal attention of queries [start, start + queries).

        Args:
            q: [q_heads, queries, head_dim].
            kv: [tokens, 2, kv_heads, head_dim], complete up to the last query; rows before
                ``chunk_start`` may be reordered, and no later call may have a query there.
            start: position of the first query.
            chunk_start: position of the first query of any rank in this chunk.
            scale: factor on the scores.

        Returns:
            [q_heads, queries, head_dim].
        """
        tiles = self._tiles(start, q.shape[1])
        k, v = kv[: tiles.keys].permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        state, report = self._states[layer], self._reports[layer]
        clock = Stopwatch(k.device)
        self._cluster(state, k, v, chunk_start, tiles.blocks)
        clock.lap("cluster")
        sampled = _sampled(tiles, layer)
        position = start + sampled.to(k.device)
        weights = self._patch_mass.weights(position, tiles.keys)
        run = _Run(state, tiles, self._forced(tiles), scale, self._buffers, sampled, weights)
        heads = torch.arange(len(k), device=k.device)
        result = run.sparse(q, k, v, heads, self._policy.epsilon)
        clock.lap("sparse")
        out, attended, proof = self._certified(run, q, k, v, result, layer)
        self._note(layer, tiles, attended, proof)
        order = state.order[:, : tiles.keys]
        self._patch_mass.add(proof.weighted, len(q), position, order)
        clock.lap("certify")
        report.select_s += clock.seconds("cluster") + result.clock.seconds("select")
        report.attend_s += result.clock.seconds("attend")
        report.certify_s += clock.seconds("certify")
        return out

    def observe(self, layer: int, q: Tensor, kv: Tensor, start: int, scale: float) -> None:
        """Note queries that were attended to exactly elsewhere; arguments as of ``attend``."""
        if not q.shape[1]:
            return
        tiles = self._tiles(start, q.shape[1])
        clock = Stopwatch(kv.device)
        k = kv[: tiles.keys, 0].transpose(0, 1)
        sampled = _sampled(tiles, layer).to(q.device)
        position = start + sampled
        weights = self._patch_mass.weights(position, tiles.keys)
        weighted = torch.stack([
            visible_mass(exact_rows(rows[:, sampled], keys, position, scale)[1], weights)
            for rows, keys in zip(q.chunk(len(k)), k, strict=True)
        ])  # fmt: skip
        order = self._states[layer].order[:, : tiles.keys]
        self._patch_mass.add(weighted, len(q), position, order)
        self._grids.add_dense(layer, tiles, range(len(k)))
        self._note(layer, tiles, [float(tiles.causal_keys)] * len(k))
        clock.lap("certify")
        self._reports[layer].certify_s += clock.seconds("certify")

    def report(self) -> RankAttention:
        """What was measured so far."""
        mass, rows = self._patch_mass.totals()
        return RankAttention(
            self._settings.from_tokens, self._reports, mass, rows,
            self._grids.pairs, self._grids.causal,
        )  # fmt: skip

    # ---- steps -----------------------------------------------------------------------------

    def _sparse_at(self, keys: int) -> bool:
        return not self._policy.exact and keys >= self._settings.from_tokens

    def _tiles(self, start: int, queries: int) -> Tiles:
        sizes = self._settings
        return Tiles(queries, start, sizes.tile_tokens, sizes.block_tokens)

    def _cluster(
        self, state: _LayerState, k: Tensor, v: Tensor, chunk_start: int, blocks: int
    ) -> None:
        """Order the segments that ended before this chunk, and summarise what is new.

        What is kept by place stays in place: the sinks, and the temporal patch before this chunk.
        """
        block, segment = self._settings.block_tokens, self._settings.segment_tokens
        recent = int(previous_patch(self._patch_ends, chunk_start))
        start, end = state.clustered, recent // segment * segment
        if end > start:
            fixed = 0 if start else self._settings.sink_blocks * block
            order = start + order_segments(k[:, start:end], block, segment, fixed)
            for head in range(len(k)):
                k[head, start:end] = k[head].index_select(0, order[head])
                v[head, start:end] = v[head].index_select(0, order[head])
            if not start:
                state.order = state.order.int()  # a copy of what all layers share
            state.order[:, start:end] = order
            state.clustered = end
        # Blocks after the clustered ones change once more when their segment is complete.
        if blocks * block > start:
            fresh = slice(start, blocks * block)
            state.summaries.put(start // block, summarize(k[:, fresh], v[:, fresh], block))

    def _forced(self, tiles: Tiles) -> Tensor:
        first = [tiles.q_offset + t * tiles.tile_tokens for t in range(tiles.count)]
        recent = previous_patch(self._patch_ends, first)
        return forced_blocks(tiles, self._settings.sink_blocks, recent.tolist())

    def _certified(
        self, run: _Run, q: Tensor, k: Tensor, v: Tensor, result: SparseResult, layer: int
    ) -> tuple[Tensor, list[float], Certificate]:
        """Output that meets the floor, key columns attended per KV head, and the measurements."""
        heads = torch.arange(len(k), device=k.device)
        out, attended = result.out, result.attended(run.tiles)
        proof = run.certify(q, k, v, result, heads)
        floor, report = self._policy.min_kept_mass, self._reports[layer]
        for turn, factor in enumerate(_RETRY_FACTORS):
            poor = (proof.kept_mass.mean(1) < floor).nonzero()[:, 0]
            if not len(poor):
                break
            if not turn:  # whoever needs a second retry has had a first
                report.tiles_redone += len(poor) * run.tiles.count
            retry = run.sparse(q, k, v, poor, self._policy.epsilon * factor)
            again = run.certify(q, k, v, retry, poor)
            run.rows(out, len(k))[poor] = run.rows(retry.out, len(poor))
            result.keep[poor], attended[poor.cpu()] = retry.keep, retry.attended(run.tiles)
            proof.kept_mass[poor], proof.output_error[poor] = again.kept_mass, again.output_error
        poor = (proof.kept_mass.mean(1) < floor).nonzero()[:, 0]
        if len(poor):
            dense = attend_causal(run.rows(q, len(k))[poor].flatten(0, 1), k[poor], v[poor],
                                  run.tiles.q_offset, run.scale)  # fmt: skip
            run.rows(out, len(k))[poor] = run.rows(dense.out, len(poor))
            result.keep[poor] = ~run.tiles.hidden(k.device)
            attended[poor.cpu()] = float(run.tiles.causal_keys)
            proof.kept_mass[poor], proof.output_error[poor] = 1.0, 0.0
            report.tiles_dense += len(poor) * run.tiles.count
        self._grids.add(layer, run.tiles, result.keep, run.state.order)
        return out, attended.tolist(), proof

    def _note(
        self, layer: int, tiles: Tiles, attended: list[float], proof: Certificate | None = None
    ) -> None:
        """Count what was attended; what was exact anyway has nothing to be certified."""
        report = self._reports[layer]
        report.attended = [a + b for a, b in zip(report.attended, attended, strict=True)]
        report.causal += tiles.causal_keys
        report.tiles += tiles.count * len(attended)
        if proof is not None:
            report.kept_mass.add(proof.kept_mass)
            report.output_error.add(proof.output_error)
        if layer == 0:
            self._grids.add_causal(tiles)


@dataclass(frozen=True, slots=True)
class _Run:
    """One layer's attention of one run of queries; ``weights`` are those of the sampled rows."""

    state: _LayerState
    tiles: Tiles
    forced: Tensor
    scale: float
    buffers: GatherBuffers
    sampled: Tensor
    weights: Tensor

    def rows(self, x: Tensor, kv_heads: int) -> Tensor:
        """[q_heads, ...] as [kv_heads, group, ...] (a view)."""
        return x.view(kv_heads, -1, *x.shape[1:])

    def sparse(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, epsilon: float
    ) -> SparseResult:
        """Sparse attention of some KV heads."""
        q, k, v, summaries = self._of(q, k, v, heads)
        budget = torch.full((len(heads),), epsilon, device=k.device)
        return sparse_attention(
            q, k, v, summaries, self.tiles, budget, self.forced, self.scale, self.buffers
        )

    def certify(
        self, q: Tensor, k: Tensor, v: Tensor, result: SparseResult, heads: Tensor
    ) -> Certificate:
        """Measure sampled rows of ``result``, which is of the KV heads ``heads``."""
        q, k, v, summaries = self._of(q, k, v, heads)
        return certify(
            q, k, v, result, summaries, self.tiles, self.sampled, self.weights, self.scale
        )  # fmt: skip

    def _of(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, BlockSummaries]:
        if len(heads) == len(k):
            return q, k, v, self.state.summaries
        rows = self.rows(q, len(k))[heads].flatten(0, 1)
        return rows, k[heads], v[heads], self.state.summaries.heads(heads)


def _sampled(tiles: Tiles, layer: int) -> Tensor:
    """The queries that are measured; others in each layer and chunk."""
    samples = max(2, min(_MAX_SAMPLES, tiles.queries // _SAMPLE_EVERY))
    return sample_rows(tiles.queries, samples, tiles.q_offset // tiles.tile_tokens + 7 * layer)
