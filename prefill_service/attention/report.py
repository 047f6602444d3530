"""What a prefill reports of its attention: density, kept mass, times; per layer and KV head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
from torch import Tensor

NEVER = 1 << 30
"""``sparse_from_tokens`` where no length gains from sparsity."""

_BINS = 1000


@dataclass(slots=True)
class Distribution:
    """Sampled values in [0, 1] (larger ones count as 1 in percentiles), mergeable over ranks."""

    count: int = 0
    total: float = 0.0
    least: float = 1.0
    bins: list[int] = field(default_factory=lambda: [0] * _BINS)

    def add_values(self, values: Tensor) -> None:
        """Count float values of any shape."""
        if values.numel() == 0:
            return
        values = values.detach().double().flatten().cpu()
        self.count += values.numel()
        self.total += float(values.sum())
        self.least = min(self.least, float(values.min()))
        index = (values.clamp(0, 1) * _BINS).long().clamp(max=_BINS - 1)
        for at, found in Counter(index.tolist()).items():  # few values at a time
            self.bins[at] += found

    def merge(self, other: Distribution) -> None:
        """Take in another rank's values."""
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.bins = [a + b for a, b in zip(self.bins, other.bins, strict=True)]

    def mean(self, default: float) -> float:
        """The mean of all values; ``default`` if there are none."""
        return self.total / self.count if self.count else default

    def percentile(self, share: float, default: float) -> float:
        """Lower edge of the bin (width 0.001) that holds the ``share`` quantile."""
        if not self.count:
            return default
        wanted = share * self.count
        return next(i for i, seen in enumerate(accumulate(self.bins)) if seen >= wanted) / _BINS


@dataclass(slots=True)
class LayerReport:
    """One layer of one prefill, over all its chunks (and, once merged, over all ranks).

    Attributes:
        layer: index.
        attended: [kv_heads] key columns attended, summed over query tokens: tokens of kept blocks
            and of the local region, plus one per block summary.
        causal: keys a dense causal attention would have attended, summed over query tokens.
        tiles: (KV head, query tile) pairs computed.
        tiles_redone: of them, computed again with a smaller epsilon.
        tiles_dense: of them, computed densely in the end (the floor left no other way).
        kept_mass: of sampled (query row, query head) pairs: 1 - total variation distance between
            the exact attention distribution and the one used.
        output_error: of the same pairs: norm of the output's error over that of the exact output.
        select_s, attend_s, verify_s: seconds (of the slowest rank) in clustering + summaries +
            selection, in the attention itself (of what was computed again, too), and in the
            verification.
        head_mass: [q_heads] sum of ``kept_mass`` over the sampled rows; empty if there were none.
    """

    layer: int
    attended: list[float]
    causal: float = 0.0
    tiles: int = 0
    tiles_redone: int = 0
    tiles_dense: int = 0
    kept_mass: Distribution = field(default_factory=Distribution)
    output_error: Distribution = field(default_factory=Distribution)
    select_s: float = 0.0
    attend_s: float = 0.0
    verify_s: float = 0.0
    head_mass: list[float] = field(default_factory=list)

    def add_kept_mass(self, values: Tensor) -> None:
        """Take in the [kv_heads, queries_per_kv, samples] of a verification."""
        self.kept_mass.add_values(values)
        self._add_head_mass(values.double().sum(-1).flatten().tolist())

    def _add_head_mass(self, sums: list[float]) -> None:
        if sums:
            mine = self.head_mass or [0.0] * len(sums)
            self.head_mass = [a + b for a, b in zip(mine, sums, strict=True)]

    def merge(self, other: LayerReport) -> None:
        """Take in another rank's part of the same layer."""
        self.attended = [a + b for a, b in zip(self.attended, other.attended, strict=True)]
        self.causal += other.causal
        self.tiles += other.tiles
        self.tiles_redone += other.tiles_redone
        self.tiles_dense += other.tiles_dense
        self.kept_mass.merge(other.kept_mass)
        self.output_error.merge(other.output_error)
        self.select_s = max(self.select_s, other.select_s)
        self.attend_s = max(self.attend_s, other.attend_s)
        self.verify_s = max(self.verify_s, other.verify_s)
        self._add_head_mass(other.head_mass)

    def among(self, heads: slice, kv_heads: int) -> LayerReport:
        """The same as a part of more KV heads; keys are counted where the first one is."""
        queries_per_kv = len(self.head_mass) // max(1, len(self.attended))
        before = [0.0] * heads.start
        after = [0.0] * (kv_heads - heads.stop)
        return replace(
            self,
            attended=[*before, *self.attended, *after],
            causal=0.0 if before else self.causal,
            head_mass=[*before * queries_per_kv, *self.head_mass, *after * queries_per_kv],
        )

    @property
    def head_density(self) -> list[float]:
        """[kv_heads] attended over causal keys; 1 where nothing was to be attended."""
        return [a / self.causal if self.causal else 1.0 for a in self.attended]

    @property
    def density(self) -> float:
        """Attended over causal keys, mean over the KV heads."""
        heads = self.head_density
        return sum(heads) / len(heads)


@dataclass(slots=True)
class BlockMap:
    """Which keys one KV head's query tiles attended to, coarsened to a grid.

    Attributes:
        layer, kv_head: whose.
        rows, columns: of the grid; both axes span all tokens of the prefix.
        density: [rows * columns] row-major; attended over causal (query, key) pairs of the cell,
            -1 where the cell holds no causal pair.
    """

    layer: int
    kv_head: int
    rows: int
    columns: int
    density: list[float]


@dataclass(slots=True)
class AttentionReport:
    """One prefill's attention.

    Attributes:
        sparse_from_tokens: queries that see fewer keys were computed exactly (``exact``: all);
            ``NEVER`` where no length would have gained.
        layers: one per layer that attends (the last layer's attention is never needed).
        patch_mass: [temporal patches] attention that the sampled rows pay to a patch's tokens,
            relative to uniform attention over the keys they see (1 = no more than chance); mean
            over layers, query heads and the rows that see the patch. Empty if no row was sampled.
        block_map: of the layer and KV head of the lowest density; ``None`` if nothing was sparse.
        imbalance: (query, key) pairs attended to by the busiest rank over the mean of the ranks,
            each summed over chunks and layers, at which ranks wait for each other (rho of db-SP,
            arXiv 2511.23113).
        imbalance_before: the same, had no rank attended to a part of what others had selected.
    """

    sparse_from_tokens: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    patch_mass: list[float] = field(default_factory=list)
    block_map: BlockMap | None = None
    imbalance: float = 1.0
    imbalance_before: float = 1.0

    @property
    def density(self) -> float:
        """Attended over causal keys, over all layers and KV heads."""
        causal = sum(layer.causal * len(layer.attended) for layer in self.layers)
        return sum(sum(layer.attended) for layer in self.layers) / causal if causal else 1.0


@dataclass(slots=True)
class RankAttention:
    """One rank's part of an ``AttentionReport``.

    Attributes:
        patch_mass, patch_rows: [temporal patches] sum of the sampled rows' relative mass, and
            how many rows that was.
        pairs: [layers, kv_heads, grid, grid], attended (query, key) pairs per cell.
        causal: [grid, grid], the pairs that dense attention would have attended.
        selected, computed: [chunks, layers] (query, key) pairs of this rank's queries, what was
            computed again included, and those that it attended to, for itself or for others.
    """

    sparse_from_tokens: int
    layers: list[LayerReport]
    patch_mass: np.ndarray
    patch_rows: np.ndarray
    pairs: np.ndarray
    causal: np.ndarray
    selected: np.ndarray
    computed: np.ndarray

    def among(self, heads: slice, kv_heads: int) -> RankAttention:
        """The same, measured of the KV heads ``heads``, as a part of all ``kv_heads``.

        What does not depend on the head is counted by the rank that has the first one.
        """
        if (heads.start, heads.stop) == (0, kv_heads):
            return self
        pairs = np.zeros((len(self.pairs), kv_heads, *self.pairs.shape[2:]), self.pairs.dtype)
        pairs[:, heads] = self.pairs
        return replace(
            self,
            layers=[layer.among(heads, kv_heads) for layer in self.layers],
            pairs=pairs,
            causal=np.zeros_like(self.causal) if heads.start else self.causal,
        )


def combine(parts: Sequence[RankAttention]) -> AttentionReport:
    """The report of a prefill from its ranks' parts. The parts are consumed."""
    before = _imbalance([part.selected for part in parts])
    after = _imbalance([part.computed for part in parts])
    first, *others = parts
    for part in others:
        for layer, other in zip(first.layers, part.layers, strict=True):
            layer.merge(other)
    rows = np.sum([part.patch_rows for part in parts], axis=0)
    mass = np.sum([part.patch_mass for part in parts], axis=0)
    pairs = np.sum([part.pairs for part in parts], axis=0)
    causal = np.sum([part.causal for part in parts], axis=0)
    return AttentionReport(
        sparse_from_tokens=first.sparse_from_tokens,
        layers=first.layers,
        patch_mass=(mass / np.maximum(rows, 1)).tolist() if rows.any() else [],
        block_map=_sparsest_map(first.layers, pairs, causal),
        imbalance=after,
        imbalance_before=before,
    )


def _imbalance(ranks: Sequence[np.ndarray]) -> float:
    """Busiest rank over the mean, of one [chunks, layers] array per rank."""
    work = np.stack(ranks)
    mean = work.mean(0).sum()
    return float(work.max(0).sum() / mean) if mean else 1.0


def _sparsest_map(
    layers: list[LayerReport], pairs: np.ndarray, causal: np.ndarray
) -> BlockMap | None:
    """The map of the head of the lowest density; ``None`` if all attend to all keys."""
    density = np.array([layer.head_density for layer in layers])
    if not density.size or density.min() == 1:
        return None
    layer, head = (int(i) for i in np.unravel_index(density.argmin(), density.shape))
    cells = np.where(causal > 0, pairs[layer, head] / np.maximum(causal, 1), -1.0)
    rows, columns = causal.shape
    return BlockMap(
        layer=layer,
        kv_head=head,
        rows=rows,
        columns=columns,
        density=cells.round(4).flatten().tolist(),
    )
