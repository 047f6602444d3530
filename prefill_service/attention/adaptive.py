"""Token-adaptive attention of one prefill on one rank: exact while short, then sparse, measured.

Keys and values live in one buffer per layer. Once a segment lies before all that a query keeps by
place, its rows are put in clustered order, in place; dense attention may go on using it, since it
needs no mask there. Each sparse attention is certified on sampled rows, and KV heads that miss
the floor are computed again with a smaller epsilon, then densely.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.fallback import LayerRun
from prefill_service.attention.key_source import KeySource, LayerState, ReplicatedKeys, Segments
from prefill_service.attention.patch_mass import BlockGrids, PatchMass
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import LayerReport, RankAttention, WorkLog
from prefill_service.attention.sampling import certified_rows, observed_rows
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.attend import forced_blocks, previous_patch
from prefill_service.attention.sparse.cpu_backend import GatherBuffers
from prefill_service.attention.sparse.summaries import empty_summaries
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention.verification import (
    Certificate,
    exact_rows,
    visible_mass,
)


class AdaptiveAttention:
    """Attention and its measurements for all layers of one prefill.

    Args:
        settings: sizes.
        policy: the request's epsilon and floor, and how heads share the epsilon.
        layers: layers that attend.
        kv_heads, head_dim, dtype, device: of K and V.
        patch_ends: [patches] one past each temporal patch's last token.
        heads: KV heads that are attended to here, where others have the rest.

    Raises:
        ValueError: the policy's budgets are those of other layers or heads.
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
        heads: slice | None = None,
    ) -> None:
        self._settings, self._policy = settings, policy
        self._patch_ends = patch_ends
        tokens = int(patch_ends[-1])
        self._heads = slice(0, kv_heads) if heads is None else heads
        self._all_heads, epsilons = kv_heads, policy.head_epsilons(layers, kv_heads)
        mine = [layer[self._heads] for layer in epsilons]
        self._epsilons = [torch.tensor(layer, device=device) for layer in mine]
        self._row_limits = [
            torch.tensor([policy.row_limit(value) for value in layer], device=device)
            for layer in mine
        ]
        kv_heads = self._heads.stop - self._heads.start
        self._reports = [LayerReport(layer, [0.0] * kv_heads) for layer in range(layers)]
        self._patch_mass = PatchMass(patch_ends, device)
        self._grids = BlockGrids(layers, kv_heads, tokens)
        self._buffers = GatherBuffers()
        self._work = WorkLog(layers)
        blocks = tokens // settings.block_tokens if self._sparse_at(tokens) else 0
        raster = torch.arange(tokens, device=device).expand(kv_heads, -1)
        self._states = [
            LayerState(empty_summaries(kv_heads, blocks, head_dim, dtype, device), raster)
            for _ in range(layers)
        ]

    def start_chunk(self) -> None:
        """What follows is of the next chunk: ranks wait for each other at every layer of it."""
        self._work.start_chunk()

    def moved(self, layer: int, pairs: int) -> None:
        """Note pairs that this rank attended to for others, or if negative they for it."""
        self._work.computed[-1][layer] += pairs

    def pairs(self, layer: int) -> int:
        """(query, key) pairs of this rank's queries of the chunk, so far."""
        return int(self._work.selected[-1][layer])

    @property
    def segments(self) -> Segments:
        """How past keys are cut."""
        return self._settings.segments

    def catch_up(self, layer: int, start: int, source: KeySource) -> None:
        """Bring this rank's view of the keys to where queries from ``start`` on want it."""
        source.prepare(layer, self._states[layer], self.recent(start), self._tiles(start, 1))

    def is_sparse(self, start: int, queries: int) -> bool:
        """Whether queries [start, start + queries) are to go through ``attend``."""
        return queries > 0 and self._sparse_at(start + queries)

    def state(self, layer: int) -> LayerState:
        """What is known of a layer's keys."""
        return self._states[layer]

    def recent(self, start: int) -> int:
        """Token from which on queries from ``start`` on keep all by place: the patch before."""
        return int(previous_patch(self._patch_ends, start))

    def attend(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        start: int,
        scale: float,
        source: KeySource | None = None,
    ) -> Tensor:
        """Sparse causal attention of queries [start, start + queries), a unit.

        What is selected depends on the unit and on the keys, not on what else this rank computes.

        Args:
            q: [q_heads, queries, head_dim].
            kv: [tokens, 2, kv_heads, head_dim], complete up to the last query; rows before
                ``recent(start)`` may be reordered, and no later call may have a query there.
            start: position of the first query.
            scale: factor on the scores.
            source: brings into ``kv`` what is not there; without it all is.

        Returns:
            [q_heads, queries, head_dim].
        """
        source = source or ReplicatedKeys(kv, self._settings.segments)
        tiles = self._tiles(start, q.shape[1])
        k, v = kv[: tiles.keys].permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        state, report = self._states[layer], self._reports[layer]
        clock = Stopwatch(k.device)
        # What is kept by place stays in place: the sinks, and the patch before this unit.
        source.prepare(layer, state, self.recent(start), tiles)
        clock.lap("cluster")
        sampled, closer = certified_rows(self._settings, tiles, layer)
        position = start + sampled.to(k.device)
        weights = self._patch_mass.weights(position, tiles.keys)
        run = LayerRun(
            source, state.summaries, tiles, self._forced(tiles), scale, self._buffers, sampled,
            weights, closer, self._epsilons[layer], self._row_limits[layer],
        )  # fmt: skip
        done = run.attend(q, k, v, self._policy.min_kept_mass)
        report.tiles_redone += done.redone * tiles.count
        report.tiles_dense += done.dense * tiles.count
        self._grids.add(layer, tiles, done.keep, state.order)
        self._note(layer, tiles, done.attended.tolist(), done.proof)
        self._work.add(layer, done.pairs)
        if done.proof.weighted.shape[1]:
            self._note_mass(state, tiles, len(q), position, done.proof.weighted)
        clock.lap("sparse")
        report.select_s += clock.seconds("cluster") + done.select_s
        report.attend_s += done.attend_s
        # All that is neither selection nor attention is there to know what they did.
        report.certify_s += clock.seconds("sparse") - done.select_s - done.attend_s
        return done.out

    def observe(self, layer: int, q: Tensor, kv: Tensor, start: int, scale: float) -> None:
        """Note queries that were attended to exactly elsewhere; arguments as of ``attend``."""
        if not q.shape[1]:
            return
        tiles = self._tiles(start, q.shape[1])
        clock = Stopwatch(kv.device)
        k = kv[: tiles.keys, 0].transpose(0, 1)
        sampled = observed_rows(tiles, layer).to(q.device)
        position = start + sampled
        weights = self._patch_mass.weights(position, tiles.keys)
        weighted, scratch = [], GatherBuffers()
        for rows, keys in zip(q.chunk(len(k)), k, strict=True):
            p, _ = exact_rows(rows[:, sampled], keys, position, start, scale, scratch)
            weighted.append(visible_mass(p, weights))
        mass = torch.stack(weighted)  # [kv_heads, keys]
        self._note_mass(self._states[layer], tiles, len(q), position, mass)
        self._grids.add_dense(layer, tiles, range(len(k)))
        self._note(layer, tiles, [float(tiles.causal_keys)] * len(k))
        self._work.add(layer, float(tiles.causal_keys * len(k)))
        clock.lap("certify")
        self._reports[layer].certify_s += clock.seconds("certify")

    def attended(self, layer: int, seconds: float) -> None:
        """Note the time of exact attention that was computed elsewhere."""
        self._reports[layer].attend_s += seconds

    def count(self, layer: int, start: int, queries: int) -> None:
        """Count queries attended to exactly, of whose keys this rank holds only a part."""
        tiles, report = self._tiles(start, queries), self._reports[layer]
        self._grids.add_dense(layer, tiles, range(len(report.attended)))
        self._note(layer, tiles, [float(tiles.causal_keys)] * len(report.attended))
        self._work.add(layer, float(tiles.causal_keys * len(report.attended)))

    def report(self) -> RankAttention:
        """What was measured so far."""
        mass, rows = self._patch_mass.totals()
        found = RankAttention(
            self._settings.from_tokens, self._reports, mass, rows,
            self._grids.pairs, self._grids.causal, *self._work.arrays(),
        )  # fmt: skip
        return found.among(self._heads, self._all_heads)

    # ---- steps -----------------------------------------------------------------------------

    def _sparse_at(self, keys: int) -> bool:
        return not self._policy.exact and keys >= self._settings.from_tokens

    def _tiles(self, start: int, queries: int) -> Tiles:
        sizes = self._settings
        return Tiles(queries, start, sizes.tile_tokens, sizes.block_tokens)

    def _forced(self, tiles: Tiles) -> Tensor:
        first = [tiles.q_offset + t * tiles.tile_tokens for t in range(tiles.count)]
        recent = previous_patch(self._patch_ends, first)
        return forced_blocks(tiles, self._settings.sink_blocks, recent.tolist())

    def _note(
        self, layer: int, tiles: Tiles, attended: list[float], proof: Certificate | None = None
    ) -> None:
        """Count what was attended; what was exact anyway has nothing to be certified."""
        report = self._reports[layer]
        report.attended = [a + b for a, b in zip(report.attended, attended, strict=True)]
        report.causal += tiles.causal_keys
        report.tiles += tiles.count * len(attended)
        if proof is not None:
            report.add_kept_mass(proof.kept_mass)
            report.output_error.add(proof.output_error)
        if layer == 0:
            self._grids.add_causal(tiles)

    def _note_mass(
        self, state: LayerState, tiles: Tiles, heads: int, position: Tensor, weighted: Tensor
    ) -> None:
        """``weighted`` [kv_heads, keys] is that of the sampled rows at ``position``."""
        order, stand_for = state.order[:, : tiles.keys], tiles.queries / len(position)
        self._patch_mass.add(weighted, heads, position, order, stand_for)
