"""Blocks on quality: answers by quality step, selection beside the field's, attention on CPUs."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import tables
from benchmarks.quality.selection_tables import DENSITIES, METHODS
from benchmarks.report.results import Row, content, one, only, rows, share
from prefill_service.attention.quality import Quality, resolve_policy

_STEPS = tuple(str(step) for step in Quality if step.step.epsilon is not None)
_APPROXIMATE = ("high", "balanced", "fast")
_METHODS = ("exact", "spava", "star", "apb")


def dial() -> str:
    """The quality steps, from the code that defines them."""
    lines = []
    for name in _STEPS:
        policy = resolve_policy(Quality(name))
        lines.append(
            [
                f"`{name}`" + (", the default" if name == "balanced" else ""),
                f"{policy.epsilon:g}",
                "" if policy.exact else f"{policy.row_limit(policy.epsilon):g}",
                f"{policy.min_kept_mass:g}",
            ]
        )
    lines.append(["an explicit epsilon", "epsilon", "epsilon / 2", "1 - 2 epsilon"])
    return tables.markdown(("quality", "epsilon", "limit for single rows", "floor"), lines)


def fidelity() -> str:
    """Density and accuracy by quality and length, and points lost with their interval."""
    found = only(rows("fidelity"), where="process", task="all", ranks=1)
    lengths = sorted({row["temporal_patches"] for row in found})
    lines = []
    for name in dict.fromkeys(row["quality"] for row in found):
        cells = []
        for length in lengths:
            row = one(found, quality=name, temporal_patches=length)
            cells.append("" if row is None else f"{row['density']:.2f}, {row['accuracy']:.3f}")
        lost = one(content("fidelity.meta")["losses"], quality=name, ranks=1)
        assert lost is not None
        lines.append(
            [
                _quality(name),
                *cells,
                f"{lost['points_lost']:.1f} [{lost['low']:.1f}, {lost['high']:.1f}]",
                f"{lost['worst_points_lost']:.1f}, {lost['worst_cell']}",
            ]
        )
    header = (
        "quality",
        *(f"{length:,} patches" for length in lengths),
        "points lost [95 %]",
        "worst cell",
    )
    return tables.markdown(header, lines)


def through_service() -> str:
    """The same questions through the whole service, beside vLLM alone."""
    header = ("system", "quality", "questions", "right", "equal to exact", "density", "kept mass")
    lines = []
    for row in rows("fidelity"):
        if row["where"] == "process":
            continue
        density = row["density"]
        mass = row["kept_mass_certified"]
        lines.append(
            [
                row["where"],
                f"`{row['quality']}`",
                row["questions"],
                share(row["accuracy"]),
                share(row["agreement_with_exact"]),
                "" if density is None else f"{density:.2f}",
                "" if mass is None else f"{mass:.2f}",
            ]
        )
    return tables.markdown(header, lines)


def adversarial() -> str:
    """Videos made to fool selection: answers that changed though the floor was met."""
    found = content("fidelity.meta")["adversarial"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in found):
        exact = one(found, case=case, quality="exact")
        assert exact is not None
        lines.append(
            [
                case,
                exact["answers"],
                f"{exact['right']:.2f}",
                *(_changed(one(found, case=case, quality=name)) for name in _APPROXIMATE),
            ]
        )
    header = ("case", "answers", "exact right", *(f"`{name}`" for name in _APPROXIMATE))
    return tables.markdown(header, lines)


def sampling() -> str:
    """Right answers about files of constant and variable rate, sampled by frame and by time."""
    found = rows("sampling")
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        cells: list[object] = [kind, 0]
        for by in ("FRAME", "TIME"):
            row = one(found, kind=kind, by=by)
            assert row is not None
            cells[1] = row["questions"]
            cells += [
                f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                f"{row['stamps_off_s']:.1f} s",
            ]
        lines.append(cells)
    header = ("file", "questions", "by frame [95 %]", "stamps off", "by time [95 %]", "stamps off")
    return tables.markdown(header, lines)


def published() -> str:
    """Right answers after prefills by the published methods, on four ranks."""
    found = only(rows("fidelity"), where="process", task="all", ranks=4)
    lengths = sorted({row["temporal_patches"] for row in found})
    lines: list[list[object]] = []
    for length in lengths:
        cells = [one(found, quality=name, temporal_patches=length) for name in _METHODS]
        assert cells[0] is not None
        lines.append(
            [
                length,
                cells[0]["questions"],
                *(share(cell["accuracy"] if cell else None) for cell in cells),
            ]
        )
    return tables.markdown(("patches", "questions", *_METHODS), lines)


def selection_mixture() -> str:
    """Whole selection methods on the synthetic mixture."""
    return _selection("selection")


def selection_trained() -> str:
    """Whole selection methods on the layers of a trained model."""
    return _selection("selection-trained")


def attention_cpu() -> str:
    """Speed-up over torch's SDPA times density, on one and two threads."""
    found = rows("attention-cpu")
    lines = []
    keys = {(row["tokens"], row["density"]): row["wanted_density"] for row in found}
    for (tokens, _), wanted in keys.items():
        cells = []
        for threads in (1, 2):
            row = one(found, tokens=tokens, wanted_density=wanted, threads=threads)
            if row is None:
                cells += ["", "", "", ""]
                continue
            flex = row["flex_s"]
            cells += [
                f"{row['density']:.2f}",
                f"{row['ratio_attend']:.2f}",
                f"{row['ratio_total']:.2f}",
                f"{row['density'] * row['dense_s'] / flex:.2f}" if flex else "",
            ]
        lines.append([f"{tokens:,}", *cells])
    columns = ("density", "attend", "total", "Flex")
    header = (
        "tokens",
        *(f"{name}, {count}" for count in ("1 thread", "2 threads") for name in columns),
    )
    return tables.markdown(header, lines)


def _selection(name: str) -> str:
    found = only(rows(name), input="all")
    lines = []
    for label, estimator, order, rule, summaries in METHODS:
        method = only(found, estimator=estimator, order=order, rule=rule, summaries=summaries)
        cells = [one(method, wanted_density=density) for density in DENSITIES]
        if any(cells):
            lines.append([label, *_measures(cells)])
    header = ("method", *(f"density {density:g}" for density in DENSITIES))
    return tables.markdown(header, lines)


def _measures(cells: Iterable[Row | None]) -> list[str]:
    """Kept mass / 5th percentile / output error of each cell."""
    return [
        ""
        if row is None
        else f"{row['kept_mass']:.2f} / {row['kept_mass_p5']:.2f} / {row['output_error']:.2f}"
        for row in cells
    ]


def _changed(row: Row | None) -> str:
    """Silent failures, and in brackets those that exact had right with a clear lead."""
    return "" if row is None else f"{row['silent_failures']} ({row['sure_and_right']})"


def _quality(name: str) -> str:
    return name.replace("=", " = ") if "=" in name else f"`{name}`"
