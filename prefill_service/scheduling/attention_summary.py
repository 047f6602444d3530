"""What is kept of a prefill's attention report: a summary for the result, the rest to inspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefill_service.attention.quality import FLOOR_TOLERANCE, AttentionPolicy, Quality
from prefill_service.attention.report import (
    NEVER,
    AttentionReport,
    BlockMap,
    Distribution,
    LayerReport,
)
from prefill_service.models.prefix_plan import PrefixPlan

MAX_PATCHES = 2048
"""Points of the strip over time that are kept; those of a longer video are averaged in runs."""


@dataclass(frozen=True, slots=True)
class AttentionMeasures:
    """One layer's attention, or that of all layers (``prefill.v1.AttentionMeasures``).

    Names are the API's, which the database keeps too: ``certify_s`` is the verification's time.
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


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer of the report; ``head_density`` per KV head."""

    layer: int
    measures: AttentionMeasures
    head_density: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AttentionSummary:
    """The report as a job's result carries it (``prefill.v1.AttentionReport``)."""

    policy: AttentionPolicy
    floor_met: bool
    sparse_from_tokens: int
    total: AttentionMeasures
    layers: tuple[LayerAttention, ...]
    imbalance: float = 1.0
    imbalance_before: float = 1.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionSummary:
        """Rebuild a summary from ``dataclasses.asdict``."""
        layers = tuple(
            LayerAttention(
                layer["layer"],
                AttentionMeasures(**layer["measures"]),
                tuple(layer["head_density"]),
            )
            for layer in data["layers"]
        )
        return cls(
            policy=policy_from_dict(data["policy"]),
            floor_met=data["floor_met"],
            sparse_from_tokens=data["sparse_from_tokens"],
            total=AttentionMeasures(**data["total"]),
            layers=layers,
            imbalance=data.get("imbalance", 1.0),
            imbalance_before=data.get("imbalance_before", 1.0),
        )


@dataclass(frozen=True, slots=True)
class AttentionDetail:
    """All that is kept of one job's attention (``prefill.v1.InspectPrefillJobResponse``).

    Attributes:
        block_map: ``None`` if nothing was sparse.
        patches: (second of the video, mass relative to chance) per temporal patch or run of them.
    """

    summary: AttentionSummary
    block_map: BlockMap | None = None
    patches: tuple[tuple[float, float], ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionDetail:
        """Rebuild a detail from ``dataclasses.asdict``."""
        block_map = data["block_map"]
        return cls(
            AttentionSummary.from_dict(data["summary"]),
            BlockMap(**block_map) if block_map else None,
            tuple((float(second), float(mass)) for second, mass in data["patches"]),
        )


def policy_from_dict(data: dict[str, Any]) -> AttentionPolicy:
    """Rebuild a policy from ``dataclasses.asdict``."""
    return AttentionPolicy(Quality(data["quality"]), data["epsilon"], data["min_kept_mass"])


def summarize(policy: AttentionPolicy, report: AttentionReport) -> AttentionSummary:
    """The summary of a prefill over all its ranks."""
    layers = tuple(
        LayerAttention(layer.layer, _measure([layer]), tuple(layer.head_density))
        for layer in report.layers
    )
    floor = policy.min_kept_mass - FLOOR_TOLERANCE
    exact = policy.exact or report.sparse_from_tokens >= NEVER
    return AttentionSummary(
        policy=policy,
        floor_met=all(layer.measures.kept_mass_mean >= floor for layer in layers),
        sparse_from_tokens=0 if exact else report.sparse_from_tokens,
        total=_measure(report.layers),
        layers=layers,
        imbalance=report.imbalance,
        imbalance_before=report.imbalance_before,
    )


def _measure(layers: Sequence[LayerReport]) -> AttentionMeasures:
    mass = Distribution()
    error = Distribution()
    for layer in layers:
        mass.merge(layer.kept_mass)
        error.merge(layer.output_error)
    return AttentionMeasures(
        density=AttentionReport(layers=list(layers)).density,
        sampled_rows=mass.count,
        kept_mass_mean=mass.mean(1.0),
        kept_mass_p5=max(mass.percentile(0.05, 1.0), mass.least),  # a bin's edge may be below all
        kept_mass_min=mass.least,  # 1 of nothing
        output_error_mean=error.mean(0.0),
        output_error_p95=error.percentile(0.95, 0.0),
        tiles=sum(layer.tiles for layer in layers),
        tiles_redone=sum(layer.tiles_redone for layer in layers),
        tiles_dense=sum(layer.tiles_dense for layer in layers),
        select_s=sum(layer.select_s for layer in layers),
        attend_s=sum(layer.attend_s for layer in layers),
        certify_s=sum(layer.verify_s for layer in layers),
    )


def detail(summary: AttentionSummary, report: AttentionReport, plan: PrefixPlan) -> AttentionDetail:
    """The summary with the block map and the strip over time, bounded in size."""
    block_map = report.block_map
    mass = np.asarray(report.patch_mass, np.float64)  # [temporal patches], or nothing
    if not len(mass):
        return AttentionDetail(summary, block_map)
    seconds = patch_seconds(plan)  # [temporal patches]
    runs = min(len(mass), MAX_PATCHES)
    starts = [int(part[0]) for part in np.array_split(np.arange(len(mass)), runs)]
    means = [float(part.mean()) for part in np.array_split(mass, runs)]
    patches = tuple(zip(seconds[starts].tolist(), means, strict=True))
    return AttentionDetail(summary, block_map, patches)


def patch_seconds(plan: PrefixPlan) -> np.ndarray:
    """[temporal patches] float64, seconds from the video's first frame to the patch's first."""
    frames_per_patch = -(-len(plan.frame_indices) // plan.patch_grid[0])  # the last may be partial
    return plan.frame_seconds[::frames_per_patch]
