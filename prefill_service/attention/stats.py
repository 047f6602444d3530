"""What is noted of a prefill's attention while it is computed, for its report."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.fallback import VerifiedAttention
from prefill_service.attention.patch_mass import BlockGrids, PatchMass
from prefill_service.attention.report import LayerReport, RankAttention
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention.verification import choose_observed_rows, exact_rows, visible_mass
from prefill_service.attention_shape import PromptShape


class WorkLog:
    """(query, key) pairs of one rank, by chunk and layer.

    Attributes:
        selected, computed: see ``RankAttention``; one array [layers] per chunk.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.selected = [np.zeros(layers)]
        self.computed = [np.zeros(layers)]

    def start_chunk(self) -> None:
        """Count in a new row of both arrays."""
        self.selected.append(np.zeros(self._layers))
        self.computed.append(np.zeros(self._layers))

    def add_pairs(self, layer: int, pairs: float) -> None:
        """Count pairs of this rank's queries."""
        self.selected[-1][layer] += pairs
        self.computed[-1][layer] += pairs


class AttentionStats:
    """Density, kept mass, mass per patch, block maps and times of one prefill on one rank.

    Args:
        settings: sizes.
        shape: of the model's attention and of the prompt.
        patch_ends: [patches] one past each temporal patch's last token.
        heads: KV heads that are attended to on this rank.
    """

    def __init__(
        self,
        settings: SparseSettings,
        shape: PromptShape,
        patch_ends: np.ndarray,
        *,
        heads: slice,
    ) -> None:
        self._settings = settings
        self._shape = shape
        self._heads = heads
        here = heads.stop - heads.start
        layers = shape.attending_layers
        self._reports = [LayerReport(layer, [0.0] * here) for layer in range(layers)]
        self._patch_mass = PatchMass(patch_ends, shape.device)
        self._grids = BlockGrids(layers, here, shape.num_tokens)
        self._work = WorkLog(layers)

    def start_chunk(self) -> None:
        """What follows is of the next chunk: ranks wait for each other at every layer of it."""
        self._work.start_chunk()

    def add_delegated_pairs(self, layer: int, pairs: int) -> None:
        """Note pairs that this rank attended to for others, or if negative they for it."""
        self._work.computed[-1][layer] += pairs

    def selected_pairs(self, layer: int) -> int:
        """(query, key) pairs of this rank's queries of the chunk, so far."""
        return int(self._work.selected[-1][layer])

    def add_attend_seconds(self, layer: int, seconds: float) -> None:
        """Note the time of exact attention that was computed elsewhere."""
        self._reports[layer].attend_s += seconds

    def count_exact(self, layer: int, start: int, queries: int) -> None:
        """Count queries attended to exactly, of whose keys this rank may hold only a part."""
        tiles = self._settings.tiles(start, queries)
        report = self._reports[layer]
        heads = len(report.attended)
        self._grids.add_dense(layer, tiles, range(heads))
        self._count(layer, tiles, [float(tiles.causal_keys)] * heads)
        self._work.add_pairs(layer, float(tiles.causal_keys * heads))

    def observe_exact(
        self, layer: int, q: Tensor, kv: Tensor, *, start: int, order: Tensor
    ) -> None:
        """Count queries that were attended to exactly elsewhere, and sample where they looked.

        Args:
            layer: which.
            q: [q_heads, queries, head_dim].
            kv: [tokens, 2, kv_heads, head_dim], complete up to the last query.
            start: position of the first query.
            order: [kv_heads, tokens] original position of each row of ``kv``.
        """
        if not q.shape[1]:
            return
        tiles = self._settings.tiles(start, q.shape[1])
        clock = Stopwatch(kv.device)
        k = kv[: tiles.keys, 0].transpose(0, 1)
        sampled = choose_observed_rows(tiles, layer).to(q.device)
        position = start + sampled
        weights = self.patch_weights(position, tiles.keys)
        masses = []
        scratch = ScratchBuffers()
        for rows, keys in zip(q.chunk(len(k)), k, strict=True):
            p, _ = exact_rows(
                rows[:, sampled],
                keys,
                position=position,
                q_offset=start,
                scale=self._shape.scale,
                scratch=scratch,
            )
            masses.append(visible_mass(p, weights))
        self._add_mass(torch.stack(masses), len(q), position, tiles=tiles, order=order)
        self.count_exact(layer, start, q.shape[1])
        clock.lap("verify")
        self._reports[layer].verify_s += clock.seconds("verify")

    def patch_weights(self, position: Tensor, keys: int) -> Tensor:
        """[samples, keys] that exact probabilities of rows at ``position`` count for."""
        return self._patch_mass.weights(position, keys)

    def record_sparse(
        self, layer: int, tiles: Tiles, used: VerifiedAttention, *, position: Tensor, order: Tensor
    ) -> None:
        """Count a sparse attention.

        Args:
            layer: which.
            tiles: of the queries.
            used: the attention.
            position: [samples] of the rows verified.
            order: [kv_heads, tokens] original position of each key.
        """
        report = self._reports[layer]
        verification = used.verification
        report.tiles_redone += used.redone * tiles.count
        report.tiles_dense += used.dense * tiles.count
        self._grids.add_sparse(layer, tiles, used.keep, order)
        self._count(layer, tiles, used.attended.tolist())
        report.add_kept_mass(verification.kept_mass)
        report.output_error.add_values(verification.output_error)
        self._work.add_pairs(layer, used.pairs)
        if verification.weighted.shape[1]:
            heads = verification.kept_mass.shape[:2].numel()
            self._add_mass(verification.weighted, heads, position, tiles=tiles, order=order)

    def record_seconds(self, layer: int, used: VerifiedAttention, clock: Stopwatch) -> None:
        """Count the time of a sparse attention; ``clock`` has laps "cluster" and "sparse"."""
        report = self._reports[layer]
        select = used.seconds("select")
        attend = used.seconds("attend")
        report.select_s += clock.seconds("cluster") + select
        report.attend_s += attend
        # All that is neither selection nor attention is there to know what they did.
        report.verify_s += clock.seconds("sparse") - select - attend

    def report(self) -> RankAttention:
        """What was measured so far."""
        mass, rows = self._patch_mass.totals()
        found = RankAttention(
            sparse_from_tokens=self._settings.from_tokens,
            layers=self._reports,
            patch_mass=mass,
            patch_rows=rows,
            pairs=self._grids.pairs,
            causal=self._grids.causal,
            selected=np.stack(self._work.selected),
            computed=np.stack(self._work.computed),
        )
        return found.among(self._heads, self._shape.kv_heads)

    def _count(self, layer: int, tiles: Tiles, attended: list[float]) -> None:
        """Count queries of which each KV head attended to so many key columns."""
        report = self._reports[layer]
        report.attended = [a + b for a, b in zip(report.attended, attended, strict=True)]
        report.causal += tiles.causal_keys
        report.tiles += tiles.count * len(attended)
        if layer == 0:
            self._grids.add_causal(tiles)

    def _add_mass(
        self, weighted: Tensor, heads: int, position: Tensor, *, tiles: Tiles, order: Tensor
    ) -> None:
        """Take [kv_heads, keys] mass of the sampled rows at ``position``, of ``heads`` heads."""
        self._patch_mass.add_mass(
            weighted,
            heads,
            position,
            order=order[:, : tiles.keys],
            stand_for=tiles.queries / len(position),
        )
