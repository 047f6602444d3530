"""From measured prefills of a few layers to rows about whole models."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks import tables
from benchmarks.gpu.prefill.cells import Cell
from benchmarks.gpu.prefill.runs import DENSE, Run

COLUMNS = (
    "model", "tokens", "mode", "layers", "measured_s", "prefill_s", "tokens_per_s", "speedup",
    "mfu", "attention_share", "select", "attend", "verify", "linear_of_peak", "density",
    "kept_mass", "error", "peak_gib",
)  # fmt: skip
LEGEND = """\
layers: run, of so many. measured_s: of these. prefill_s: of the whole model; where not all layers
were run it is extrapolated (~): attention by its layers, all else by its FLOPs.
tokens_per_s, speedup (over dense), mfu, attention_share: of prefill_s. mfu: FLOPs done (of
attention, those of attended pairs) over time and the matmul peak of this run. select, attend,
verify: shares of attention in clustering + selection, in attending and in verification, as the
product reports them (verify: all the rest of it; of exact attention, the rows it observes).
linear_of_peak: FLOPs of linear layers over all time outside attention (norms, rotary embedding and
copies included) and the matmul peak. kept_mass, error: verified means of the sparse part.
peak_gib: as run, with weights and inputs."""


def make_row(cell: Cell, tokens: int, run: Run, peak: float) -> dict[str, Any]:
    """One prefill; ``speedup`` is added by ``add_speedups``.

    Args:
        tokens: of the prompt, text included.
        peak: FLOP/s of matrix products.
    """
    shape = cell.shape
    layers = cell.layers
    full = shape.layers
    other_s = run.seconds - run.attention_s
    linear, whole_linear = (shape.linear_flops(tokens, n) for n in (layers, full))
    attention_s = run.attention_s * (full - 1) / (layers - 1)
    prefill_s = attention_s + other_s * whole_linear / linear
    pairs = _pairs(run, tokens, layers) * (full - 1) / (layers - 1)
    row: dict[str, Any] = {
        "model": shape.name,
        "tokens": tokens,
        "mode": cell.mode,
        "layers": f"{layers}/{full}",
        "measured_s": run.seconds,
        "prefill_s": prefill_s,
        "extrapolated": layers < full,
        "tokens_per_s": tokens / prefill_s,
        "mfu": (whole_linear + shape.attention_flops(pairs)) / prefill_s / peak,
        "attention_share": attention_s / prefill_s,
        "linear_of_peak": linear / other_s / peak,
        "peak_bytes": run.peak_bytes,
    }
    return row | _of_reports(run)


def _pairs(run: Run, tokens: int, layers: int) -> float:
    """(query, key) pairs of one query head, mean over the heads, summed over the layers."""
    if not run.reports:
        return (layers - 1) * tokens * (tokens + 1) / 2
    return sum(mean(layer.attended) for layer in run.reports)


def _of_reports(run: Run) -> dict[str, Any]:
    """Density, times and verification that the product reports; nothing of the dense baseline."""
    if not run.reports:
        return {"density": 1.0}
    causal = sum(layer.causal for layer in run.reports)
    spent = {
        name: sum(getattr(layer, f"{name}_s") for layer in run.reports)
        for name in ("select", "attend", "verify")
    }
    total = sum(spent.values())
    tiles = sum(layer.tiles for layer in run.reports)
    found: dict[str, Any] = {
        "density": sum(layer.density * layer.causal for layer in run.reports) / causal,
        "redone": sum(layer.tiles_redone for layer in run.reports) / tiles,
        "went_dense": sum(layer.tiles_dense for layer in run.reports) / tiles,
        **{name: value / total for name, value in spent.items()},
    }
    kept = [layer.kept_mass for layer in run.reports if layer.kept_mass.count]
    if kept:
        errors = [layer.output_error for layer in run.reports if layer.output_error.count]
        found["kept_mass"] = sum(k.total for k in kept) / sum(k.count for k in kept)
        found["kept_mass_p10"] = min(k.percentile(0.1, 1.0) for k in kept)
        found["error"] = sum(e.total for e in errors) / sum(e.count for e in errors)
    return found


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Over the dense row of the same model, length and layers."""
    dense = {
        (row["model"], row["tokens"], row["layers"]): row["prefill_s"]
        for row in rows
        if row["mode"] == DENSE
    }
    for row in rows:
        base = dense.get((row["model"], row["tokens"], row["layers"]))
        row["speedup"] = base / row["prefill_s"] if base else None


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of the sparse modes that keep 0.95, the fastest at 128 K and 256 K; and the linear layers."""
    lines = []
    for wanted, low, high in ((3.0, 120_000, 145_000), (5.0, 240_000, 290_000)):
        for model in sorted({row["model"] for row in rows}):
            fit = [
                row
                for row in rows
                if row["model"] == model
                and low <= row["tokens"] < high
                and (row.get("kept_mass") or 0) >= 0.95
                and row.get("speedup")
            ]
            if not fit:
                continue
            best = max(fit, key=lambda row: float(row["speedup"]))
            met = "met" if best["speedup"] >= wanted else "NOT met"
            lines.append(
                f"{model}, {best['tokens']} tokens, {best['mode']}: {best['speedup']:.2f} times "
                f"dense at a kept mass of {best['kept_mass']:.3f}; {wanted:g} times is {met}"
            )
    ours = [row["linear_of_peak"] for row in rows if row["mode"] != DENSE]
    if ours:
        met = "met" if min(ours) >= 0.6 else "NOT met"
        lines.append(
            f"linear layers, with all else that is not attention: {min(ours):.2f} to "
            f"{max(ours):.2f} of the matmul peak; 0.60 is {met}"
        )
    return lines


def bounds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Per model and length, what would be gained if attention took no time."""
    return [
        f"{row['model']}, {row['tokens']} tokens: without any attention dense would be "
        f"{1 / (1 - row['attention_share']):.2f} times as fast"
        for row in rows
        if row["mode"] == DENSE and row["extrapolated"] and row["attention_share"] < 1
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    return tables.markdown(COLUMNS, [[_cell(row, name) for name in COLUMNS] for row in rows])


def _cell(row: dict[str, Any], name: str) -> Any:
    if name == "peak_gib":
        return None if row["peak_bytes"] is None else round(row["peak_bytes"] / 2**30, 1)
    if name == "prefill_s" and row["extrapolated"]:
        return f"~{row[name]:.3f}"
    return round(row[name]) if name == "tokens_per_s" else row.get(name)
