"""How a prefill's attention was computed, and how good it measurably is. Durations in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Quality(StrEnum):
    """How much attention mass a prefill may misplace. Arguments may also be the values."""

    UNSPECIFIED = "unspecified"
    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    FAST = "fast"
    CUSTOM = "custom"


@dataclass(frozen=True)
class AttentionMeasures:
    """One layer's attention, or that of all layers.

    Attributes:
        density: keys attended over those of dense causal attention; 1 if all was exact.
        sampled_rows: (query row, query head) pairs compared with exact attention. With 0 of
            them, kept mass and output error are those of exact attention.
        kept_mass_mean, kept_mass_p5, kept_mass_min: 1 minus the total variation distance
            between the exact attention distribution and the one used.
        output_error_mean, output_error_p95: norm of the output's error over that of the output.
        tiles: (KV head, query tile) pairs computed; ``tiles_redone`` of them again with a
            smaller epsilon, ``tiles_dense`` of them densely in the end.
        select_s, attend_s, certify_s: of the slowest rank.
    """

    density: float
    sampled_rows: int
    kept_mass_mean: float
    kept_mass_p5: float
    kept_mass_min: float
    output_error_mean: float
    output_error_p95: float
    tiles: int
    tiles_redone: int
    tiles_dense: int
    select_s: float
    attend_s: float
    certify_s: float


@dataclass(frozen=True)
class LayerAttention:
    """Measures of one layer; ``head_density`` has a value for each KV head."""

    layer: int
    measures: AttentionMeasures
    head_density: tuple[float, ...]


@dataclass(frozen=True)
class AttentionReport:
    """A prefill's attention.

    Attributes:
        quality, epsilon: as asked for.
        min_kept_mass: the floor of the kept mass.
        floor_met: whether every layer's mean is at least that.
        sparse_from_tokens: queries that see fewer keys were computed exactly; 0: all were.
        total: over all layers, times summed.
        layers: without the last one, whose attention a prefix never needs; empty if nothing was
            measured, and in listings.
        imbalance: keys attended by the busiest rank over the mean of the ranks, at each chunk and
            layer; 0 from a server that is older than this.
        imbalance_before: the same, had no rank attended to a part of what others had selected.
    """

    quality: Quality
    epsilon: float
    min_kept_mass: float
    floor_met: bool
    sparse_from_tokens: int
    total: AttentionMeasures
    layers: tuple[LayerAttention, ...]
    imbalance: float = 0.0
    imbalance_before: float = 0.0


@dataclass(frozen=True)
class BlockMap:
    """Which keys one KV head's queries attended to, on a grid over all tokens of the prefix.

    Attributes:
        density: one tuple per row (queries), one number per column (keys): attended over causal
            pairs of the cell, -1 where there is none.
    """

    layer: int
    kv_head: int
    density: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PatchAttention:
    """Attention mass of the stretch of video that begins at ``time_s``; 1 is chance."""

    time_s: float
    mass: float
