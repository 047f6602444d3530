"""Cells of the fidelity table, their intervals, and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.quality.fidelity.scoring import Asked, Setting
from tools.needle.checkpoint import TOKENS_PER_PATCH
from tools.needle.stories import TASKS

ALL = "all"
_RESAMPLES = 2000
MEASURES = ("kept_mass", "kept_mass_certified", "density")
COLUMNS = (
    "where", "task", "temporal_patches", "video_tokens", "quality", "ranks", "questions",
    "accuracy", "low", "high", "accuracy_exact", "agreement_with_exact", *MEASURES,
)  # fmt: skip


def wilson(right: int, asked: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not asked:
        return 0.0, 1.0
    z = 1.959964
    share = right / asked
    middle = share + z * z / (2 * asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return (middle - half) / (1 + z * z / asked), (middle + half) / (1 + z * z / asked)


@dataclass(frozen=True, slots=True)
class Judged:
    """How the answers to some questions compare, one flag each.

    Attributes:
        right: the answer is right.
        right_exact: that of the exact prefill to the same question is.
        same: the two are equal.
    """

    right: Sequence[bool]
    right_exact: Sequence[bool]
    same: Sequence[bool]


def row(
    where: str,
    task: str,
    patches: int,
    *,
    setting: Setting,
    judged: Judged,
    measures: dict[str, float | None],
) -> dict[str, Any]:
    """One cell of the fidelity table, in its columns."""
    right = judged.right
    low, high = wilson(sum(right), len(right))
    return {
        "where": where,
        "task": task,
        "temporal_patches": patches,
        "video_tokens": patches * TOKENS_PER_PATCH,
        "quality": setting.quality,
        "ranks": setting.ranks,
        "questions": len(right),
        "accuracy": round(float(np.mean(right)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "accuracy_exact": round(float(np.mean(judged.right_exact)), 4),
        "agreement_with_exact": round(float(np.mean(judged.same)), 4),
        **{name: _rounded(measures.get(name)) for name in MEASURES},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def rows_of(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Cells by length, setting and task; of each the pooled one first."""
    cells: dict[tuple[int, Setting], list[Asked]] = {}
    for one in asked:
        cells.setdefault((one.patches, one.setting), []).append(one)
    rows = []
    for (patches, setting), members in cells.items():
        exact = _exact_of(members, asked)
        measures = {
            "kept_mass": _mean([m.true_mass for m in members]),
            "kept_mass_certified": _mean([m.certified for m in members]),
            "density": _mean([m.density for m in members]),
        }
        for task in (ALL, *TASKS):
            chosen = [[task in (ALL, TASKS[index]) for index in member.tasks] for member in members]
            judged = Judged(
                right=_pick([m.right for m in members], chosen),
                right_exact=_pick([e.right for e in exact], chosen),
                same=_pick([m.same for m in members], chosen),
            )
            if judged.right:
                rows.append(
                    row(
                        "process",
                        task,
                        patches,
                        setting=setting,
                        judged=judged,
                        measures=measures,
                    )
                )
    return rows


def _pick(lists: Sequence[Sequence[bool]], chosen: Sequence[Sequence[bool]]) -> list[bool]:
    """The flags whose place in ``chosen`` is true, of all lists in one."""
    return [
        flag
        for flags, mask in zip(lists, chosen, strict=True)
        for flag, wanted in zip(flags, mask, strict=True)
        if wanted
    ]


def _exact_of(members: Sequence[Asked], asked: Sequence[Asked]) -> list[Asked]:
    """The exact prefill of each one's video, on as many ranks."""
    exact = {
        (one.patches, one.video, one.setting.ranks): one
        for one in asked
        if one.setting.quality == "exact"
    }
    return [exact[one.patches, one.video, one.setting.ranks] for one in members]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def losses(asked: Sequence[Asked], seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy lost against exact, in points, by quality and ranks: mean, interval, worst cell.

    The interval (95 %) resamples videos, not questions: those of one video share its prefix.
    """
    rng = np.random.default_rng(seed)
    found = []
    for setting in dict.fromkeys(one.setting for one in asked):
        members = [one for one in asked if one.setting == setting]
        exact = _exact_of(members, asked)
        lost = np.array([sum(e.right) - sum(m.right) for m, e in zip(members, exact, strict=True)])
        counts = np.array([len(m.right) for m in members])
        draws = rng.integers(0, len(lost), (_RESAMPLES, len(lost)))
        spread = 100 * lost[draws].sum(1) / counts[draws].sum(1)
        cells = _cells_lost(members, exact)
        worst = max(cells, key=lambda cell: cells[cell])
        found.append(
            {
                "quality": setting.quality,
                "ranks": setting.ranks,
                "questions": int(counts.sum()),
                "points_lost": round(100 * lost.sum() / counts.sum(), 2),
                "low": round(float(np.percentile(spread, 2.5)), 2),
                "high": round(float(np.percentile(spread, 97.5)), 2),
                "worst_cell": f"{worst[1]} at {worst[0]}",
                "worst_points_lost": round(cells[worst], 2),
            }
        )
    return found


def _cells_lost(members: Sequence[Asked], exact: Sequence[Asked]) -> dict[tuple[int, str], float]:
    """Points lost per length and task."""
    sums: dict[tuple[int, str], list[int]] = {}
    for member, truth in zip(members, exact, strict=True):
        for index, ours, theirs in zip(member.tasks, member.right, truth.right, strict=True):
            for task in (ALL, TASKS[index]):
                cell = sums.setdefault((member.patches, task), [0, 0])
                cell[0] += theirs - ours
                cell[1] += 1
    return {cell: 100 * lost / asked for cell, (lost, asked) in sums.items()}


def print_table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> None:
    """The rows of some tasks."""
    chosen = [[one[name] for name in COLUMNS] for one in rows if one["task"] in tasks]
    print(tables.markdown(COLUMNS, chosen), flush=True)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, agreement with exact, density and kept mass over length, per quality."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "accuracy": "accuracy, all tasks (bars: 95 %)",
        "agreement_with_exact": "same answer as the exact prefill",
        "density": "keys attended, share of dense",
        "kept_mass_certified": "kept mass (certificate)",
    }
    cells = [r for r in rows if r["where"] == "process" and r["task"] == ALL and r["ranks"] == 1]
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        axes.set(title=title, xlabel="temporal patches", xscale="log")
        for quality in dict.fromkeys(cell["quality"] for cell in cells):
            mine = [c for c in cells if c["quality"] == quality and c[name] is not None]
            lengths = [c["temporal_patches"] for c in mine]
            values = [c[name] for c in mine]
            if name == "accuracy":
                errors = np.array(
                    [[c["accuracy"] - c["low"], c["high"] - c["accuracy"]] for c in mine]
                ).T
                axes.errorbar(lengths, values, errors, marker="o", capsize=3, label=quality)
            else:
                axes.plot(lengths, values, "o-", label=quality)
        ticks = sorted({cell["temporal_patches"] for cell in cells})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)
