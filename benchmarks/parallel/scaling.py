"""How sequence parallelism scales: checked on this CPU, projected to GPUs.

    python -m benchmarks.parallel.scaling

First, prefills of a reduced shape run on 1 to 4 real ranks. What every rank's meter counts must
equal the cost model's traffic formulas to the byte, or the exit status is 1. Its model of work
(A per layer and chunk, B per FLOP of linear layers, C per FLOP of attention) is fitted to the CPU
time of 1 and 2 ranks, and its predictions for 3 and 4 are compared with what those took.

Then the same formulas, with rates that are assumed and printed, give seconds for real models on
GPUs. Nothing of that part is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.parallel.projection import MACHINES, Assumptions, Machine, Projection, project
from benchmarks.parallel.work import REDUCED, Measured, fit_work, measure
from prefill_service.cost_model.cost import CostModel
from prefill_service.cost_model.presets import PRESETS
from prefill_service.models.model_shape import ModelShape

CHECKED_TOKENS = (1024, 2048, 4096)
CHUNK = 256
TOKENS = (131_072, 262_144, 1_048_576)
FITTED_UP_TO = 2
CHECK_COLUMNS = (
    "ranks", "tokens", "exchange", "bytes", "formula", "cpu_s", "predicted_s", "error_percent",
)  # fmt: skip
COLUMNS = (
    "machine", "model", "tokens", "contestant", "chunk", "seconds", "waiting_s", "received_gb",
    "kv_gib", "fits", "of_ring",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if bytes differ from the formulas."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel.scaling")
    parser.add_argument("--ranks", type=int, default=4, help="most ranks on this CPU")
    parser.add_argument("--checked-tokens", type=int, nargs="+", default=CHECKED_TOKENS)
    parser.add_argument("--density", type=float, default=Assumptions().density)
    parser.add_argument("--wanted", type=float, default=Assumptions().wanted)
    parser.add_argument("--output", type=Path, default=tables.RESULTS / "sp-scaling.json")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    settings = tables.settings()
    measured: list[Measured] = []
    for ranks in range(1, options.ranks + 1):
        measured += measure(ranks, options.checked_tokens, CHUNK)
        print(f"{ranks} ranks measured", flush=True)
    model = fit_work([one for one in measured if one.ranks <= FITTED_UP_TO])
    checked = [check(one, model) for one in measured]
    print(tables.markdown(CHECK_COLUMNS, [[row[c] for c in CHECK_COLUMNS] for row in checked]))
    wrong = [row for row in checked if row["bytes"] != row["formula"]]
    summary = errors(checked)
    for compared, text in summary.items():
        print(f"CPU time of the busiest of {compared} ranks, {text}")
    given = Assumptions(density=options.density, wanted=options.wanted)
    print("\nProjected, not measured. Assumed:")
    for machine, link in MACHINES.items():
        print(f"* {machine.name}: {link}")
    print("\n".join(f"* {sentence}" for sentence in given.sentences()), end="\n\n")
    rows = projections(TOKENS, given)
    print(tables.markdown(COLUMNS, [[row[column] for column in COLUMNS] for row in rows]))
    content = {
        "settings": {
            **settings,
            "seconds": round(time.monotonic() - begin, 1),
            "chunk": CHUNK,
            "reduced": dataclasses.asdict(REDUCED),
            "fitted": dataclasses.asdict(model),
        },
        "prediction_errors": summary,
        "assumed": [
            *(f"{machine.name}: {link}" for machine, link in MACHINES.items()),
            *given.sentences(),
        ],
        "assumptions": dataclasses.asdict(given),
        "checked": checked,
        "projected_not_measured": rows,
    }
    tables.write(options.output, content)
    draw(rows, checked, options.output.with_suffix(".png"))
    if wrong:
        print(f"{len(wrong)} runs moved other bytes than the formulas say: {wrong}")
    return 1 if wrong else 0


def check(one: Measured, model: CostModel) -> dict[str, Any]:
    """One run against formulas and work model; bytes by rank."""
    took = max(one.cpu_seconds)
    predicted = one.predicted_seconds(model)
    return {
        "ranks": one.ranks,
        "tokens": one.tokens,
        "exchange": one.strategy.label,
        "bytes": list(one.received),
        "formula": list(one.predicted_bytes()),
        "cpu_s": round(took, 4),
        "predicted_s": round(predicted, 4),
        "error_percent": round(100 * (predicted / took - 1), 1),
        "fitted": one.ranks <= FITTED_UP_TO,
    }


def errors(checked: Sequence[dict[str, Any]]) -> dict[str, str]:
    """By number of ranks: mean, mean absolute and largest error of the predictions."""
    found = {}
    for ranks in sorted({row["ranks"] for row in checked}):
        mine = [row for row in checked if row["ranks"] == ranks]
        values = [row["error_percent"] for row in mine]
        worst = max(mine, key=lambda row: abs(row["error_percent"]))
        how = "fitted" if mine[0]["fitted"] else "predicted"
        found[str(ranks)] = (
            f"{how}: error {sum(values) / len(values):+.1f} % on average, "
            f"{sum(map(abs, values)) / len(values):.1f} % in absolute value, at most "
            f"{worst['error_percent']:+.1f} % ({worst['exchange']}, {worst['tokens']} tokens)"
        )
    return found


def projections(tokens: Sequence[int], given: Assumptions) -> list[dict[str, Any]]:
    """All machines, models and lengths."""
    return [
        _row(machine, shape, length, one=one, ring=ring, given=given)
        for machine in MACHINES
        for shape in PRESETS.values()
        for length in tokens
        for found in [list(project(shape, length, machine, given))]
        for ring in [next(one.seconds for one in found if one.name == "zigzag ring")]
        for one in found
    ]


def _row(
    machine: Machine,
    shape: ModelShape,
    tokens: int,
    *,
    one: Projection,
    ring: float,
    given: Assumptions,
) -> dict[str, Any]:
    return {
        "machine": machine.name,
        "model": shape.name,
        "tokens": tokens,
        "contestant": one.name,
        "chunk": one.chunk,
        "seconds": round(one.seconds, 3),
        "waiting_s": round(one.exposed, 3),
        "received_gb": round(one.received / 1e9, 2),
        "kv_gib": round(one.kv_bytes / 2**30, 2),
        "fits": "yes" if one.kv_bytes <= given.kv_bytes else "no",
        "of_ring": round(one.seconds / ring, 3),
    }


def draw(rows: Sequence[dict[str, Any]], checked: Sequence[dict[str, Any]], path: Path) -> None:
    """Time over the zigzag ring's, by length, machine and model; predictions over measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 9), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(2, 3)
    names = list(dict.fromkeys(_short(r) for r in rows))
    for row, machine in enumerate(MACHINES):
        for column, shape in enumerate(PRESETS.values()):
            axes = cells[row, column]
            axes.set(
                title=f"projected: {shape.name}, {machine.name}",
                xlabel="tokens",
                ylabel="time over the zigzag ring's",
                xscale="log",
                yscale="log",
            )
            mine = [r for r in rows if (r["machine"], r["model"]) == (machine.name, shape.name)]
            for index, name in enumerate(names):
                points = [(r["tokens"], r["of_ring"]) for r in mine if _short(r) == name]
                if points and not name.startswith("dense"):
                    style = "-" if name.startswith("ours") else "--"
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        color=f"C{index}",
                        marker="o",
                        markersize=3,
                        label=name,
                    )
            axes.set_yticks([0.2, 0.3, 0.5, 1, 2, 4], ["0.2", "0.3", "0.5", "1", "2", "4"])
            ticks = sorted({r["tokens"] for r in mine})
            axes.set_xticks(ticks, [f"{tick // 1024} K" for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    axes = cells[0, 2]
    axes.set(
        title="CPU time of the busiest rank, s",
        xlabel="measured",
        xscale="log",
        ylabel="fitted (1, 2 ranks) or predicted (3, 4)",
        yscale="log",
    )
    for ranks in sorted({r["ranks"] for r in checked}):
        mine = [r for r in checked if r["ranks"] == ranks]
        axes.plot(
            [r["cpu_s"] for r in mine],
            [r["predicted_s"] for r in mine],
            "o",
            markersize=4,
            label=f"{ranks} ranks",
        )
    ends = [f([r["cpu_s"] for r in checked]) for f in (min, max)]
    axes.plot(ends, ends, "k:", linewidth=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    axes.minorticks_off()
    axes.legend()
    axes.grid(alpha=0.3)
    cells[1, 2].axis("off")
    text = "Projections: rates are assumed, nothing\nof them is measured. Bytes received:\n"
    same = sum(r["bytes"] == r["formula"] for r in checked)
    lines = {line.get_label(): line for one in cells[:, :2].flat for line in one.lines}
    cells[1, 2].legend(lines.values(), lines, loc="upper left")
    cells[1, 2].text(
        0,
        0.1,
        f"{text}{same} of {len(checked)} runs on real ranks equal\nthe formulas to the byte.",
        fontsize=12,
    )
    figure.savefig(path, dpi=100)


def _short(row: dict[str, Any]) -> str:
    """The contestant without its mesh, which depends on the machine."""
    return "ours: usp" if "usp" in row["contestant"] else str(row["contestant"])


if __name__ == "__main__":
    sys.exit(main())
