"""What the records and the memory samples say, as rows, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.load.drive import Record
from benchmarks.processes import Sample

COLUMNS = (
    "system", "videos", "questions", "failed", "retried", "right", "p50_s", "p95_s", "worst_s",
    "upload_p50_s", "per_minute", "prompt_tokens_per_s", "drained_s",
)  # fmt: skip
MEMORY_COLUMNS = ("system", "start_mib", "peak_mib", "end_mib", "slope_mib_per_min", "samples")
LEGEND = """\
p50_s, p95_s, worst_s: from a question's arrival to the first token of its answer. A client asks one
question after the other, and waiting for its own ones before counts, as does sending the video
(upload_p50_s; vLLM alone reads it in place). per_minute: answers from the first arrival to the last
answer; drained_s: how long after the last minute that was. retried: times a question was told to
come again later. Memory: proportional set size of all the system's processes; its slope is that of
the second half of the run."""

ALL = "all"
NEW = "new"
KNOWN = "known"


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of the values do not exceed; ``None`` of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def summarize(system: str, records: Sequence[Record], seconds: float) -> list[dict[str, Any]]:
    """A row for all questions, for those about new videos and for those about known ones.

    Args:
        seconds: in which questions came up.
    """
    parts = {
        ALL: list(records),
        NEW: [record for record in records if record.fresh],
        KNOWN: [record for record in records if not record.fresh],
    }
    return [_row(system, name, part, seconds) for name, part in parts.items()]


def _row(system: str, which: str, records: Sequence[Record], seconds: float) -> dict[str, Any]:
    answered = [record for record in records if not record.error]
    waits = [record.wait_s for record in answered if record.wait_s is not None]
    end_s = max((record.done_s for record in records), default=0.0)
    span_s = end_s - min((record.at_s for record in records), default=0.0)
    return {
        "system": system,
        "videos": which,
        "questions": len(records),
        "failed": len(records) - len(answered),
        "retried": sum(record.retries for record in records),
        "right": sum(record.right for record in answered) / len(answered) if answered else None,
        "p50_s": percentile(waits, 0.5),
        "p95_s": percentile(waits, 0.95),
        "worst_s": max(waits, default=None),
        "upload_p50_s": percentile([record.upload_s for record in answered], 0.5),
        "per_minute": 60 * len(answered) / span_s if span_s > 0 else None,
        "prompt_tokens_per_s": (
            sum(record.prompt_tokens for record in answered) / span_s if span_s > 0 else None
        ),
        "drained_s": max(0.0, end_s - seconds),
    }


def slope(samples: Sequence[Sample]) -> float | None:
    """Bytes per minute over the second half, by least squares; ``None`` of fewer than three."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return None
    seconds, sizes = np.array(late, dtype=float).T
    return float(np.polyfit(seconds, sizes, 1)[0] * 60)


def memory_row(system: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Of one system's samples, of which there is at least one."""
    sizes = [size / 2**20 for _, size in samples]
    growth = slope(samples)
    return {
        "system": system,
        "start_mib": sizes[0],
        "peak_mib": max(sizes),
        "end_mib": sizes[-1],
        "slope_mib_per_min": None if growth is None else growth / 2**20,
        "samples": len(samples),
    }


def agreement(records: Mapping[str, Sequence[Record]]) -> str:
    """How often two systems answered alike; nothing of fewer."""
    if len(records) != 2:
        return ""
    (a, of_a), (b, of_b) = records.items()
    both = [(x, y) for x, y in zip(of_a, of_b, strict=True) if not (x.error or y.error)]
    same = sum(x.text == y.text for x, y in both)
    return f"{a} and {b} gave the same answer to {same} of {len(both)} questions"


def ratios(rows: Sequence[dict[str, Any]], base: str = "vllm") -> list[str]:
    """The other systems' waiting times beside the base's."""
    lines = []
    for row in rows:
        other = next(
            (r for r in rows if r["system"] == base and r["videos"] == row["videos"]), None
        )
        if other is None or row["system"] == base or not (row["p50_s"] and row["p95_s"]):
            continue
        if not (other["p50_s"] and other["p95_s"]):
            continue
        lines.append(
            f"{row['videos']} videos: {base} waits {other['p50_s'] / row['p50_s']:.2f} times as "
            f"long as {row['system']} (p50), {other['p95_s'] / row['p95_s']:.2f} times (p95)"
        )
    return lines


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Markdown."""
    return tables.markdown(columns, [[row[column] for column in columns] for row in rows])


def content(
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    records: Mapping[str, Sequence[Record]],
    samples: Mapping[str, Sequence[Sample]],
) -> dict[str, Any]:
    """For the result file."""
    memory = [memory_row(system, found) for system, found in samples.items() if found]
    result: dict[str, Any] = {"settings": settings, "rows": list(rows), "memory": memory}
    for system, found in records.items():
        result[f"records_{system}"] = [_rounded(asdict(record)) for record in found]
    for system, seen in samples.items():
        result[f"memory_{system}"] = [[round(at, 1), size] for at, size in seen]
    return result


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in record.items()}


def draw(
    records: Mapping[str, Sequence[Record]], samples: Mapping[str, Sequence[Sample]], path: Path
) -> None:
    """Waiting times over the session and their distribution, and memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over, spread, memory = figure.subplots(1, 3)
    for index, (system, found) in enumerate(records.items()):
        color = f"C{index}"
        for fresh, marker, name in ((True, "o", "new video"), (False, "x", "known video")):
            points = [(r.at_s / 60, r.wait_s) for r in found if r.fresh is fresh and r.wait_s]
            if points:
                over.scatter(
                    *zip(*points, strict=True),
                    s=16,
                    marker=marker,
                    color=color,
                    label=f"{system}, {name}",
                    alpha=0.7,
                )
        waits = sorted(r.wait_s for r in found if r.wait_s)
        shares = [(i + 1) / len(waits) for i in range(len(waits))]
        spread.plot(waits, shares, color=color, label=system, drawstyle="steps-post")
    for index, (system, seen) in enumerate(samples.items()):
        if seen:
            minutes, sizes = zip(*((at / 60, size / 2**30) for at, size in seen), strict=True)
            memory.plot(minutes, sizes, color=f"C{index}", label=system)
    over.set(xlabel="arrival, minutes", ylabel="seconds to the first token", yscale="log")
    spread.set(xlabel="seconds to the first token", ylabel="share of questions", xscale="log")
    memory.set(xlabel="minutes", ylabel="memory, GiB", ylim=(0, None))
    for axes in (over, spread, memory):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
