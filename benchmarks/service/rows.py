"""Rows of the result: medians over repeats, ratios against vLLM alone, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import tables
from benchmarks.service.cases import Case
from benchmarks.service.systems import Measured

BASELINE = "vllm"

HEADER = (
    "system", "mode", "video tokens", "first s", "vLLM/this", "CPU s", "second s", "2nd/1st",
    "3rd of 5 s", "upload s", "peak GB", "density", "kept mass", "tokens equal",
)  # fmt: skip


@dataclass(slots=True)
class Cell:
    """One system and mode on one checkpoint at one length: runs, or why there are none.

    Attributes:
        tokens: vision tokens asked for; videos have a few more.
        runs: each with its case; the same number means the same video for every system.
    """

    system: str
    mode: str
    ranks: int
    checkpoint: str
    tokens: int
    runs: dict[int, tuple[Case, Measured]] = field(default_factory=dict)
    skipped: str = ""

    def row(self, baseline: Cell | None) -> dict[str, Any]:
        """The cell as one JSON object; seconds are medians over the repeats.

        Args:
            baseline: vLLM alone on the same videos, if it was measured.
        """
        row: dict[str, Any] = {
            "system": self.system,
            "mode": self.mode,
            "ranks": self.ranks,
            "checkpoint": self.checkpoint,
            "video_tokens": self.tokens,
        }
        if not self.runs:
            nothing = ("first_token_s", "second_first_token_s", "peak_rss_bytes", "density")
            return (
                row
                | dict.fromkeys((*nothing, "kept_mass"))
                | {
                    "stages": {},
                    "skipped": self.skipped,
                }
            )
        cases, runs = zip(*self.runs.values(), strict=True)
        return row | {
            "video_tokens": cases[0].video_tokens,
            "prompt_tokens": len(cases[0].prompts[0]),
            "frames": cases[0].frames,
            "repeats": len(runs),
            "first_token_s": _median(r.first.first_token_s for r in runs),
            "first_token_runs_s": [round(r.first.first_token_s, 3) for r in runs],
            "first_cpu_s": _median(r.first.cpu_s for r in runs),
            "second_first_token_s": _median(
                r.second.first_token_s if r.second else None for r in runs
            ),
            "third_of_five_s": _median(r.third_of_five_s for r in runs),
            "upload_s": _median(r.upload_s for r in runs),
            "peak_rss_bytes": max(r.peak_bytes for r in runs),
            "stages": _stages([r.stages for r in runs]),
            "density": _median(r.density for r in runs),
            "kept_mass": _median(r.kept_mass for r in runs),
            "speedup_over_vllm": self._speedup(baseline),
            "frames_equal": all(case.frames_equal for case in cases),
            "prompts_equal": self._prompts_equal(),
            "tokens_equal": self._tokens_equal(baseline),
            "answers": [r.first.token_ids for r in runs],
        }

    def _speedup(self, baseline: Cell | None) -> float | None:
        """Median of the ratios on the same video in the same repeat."""
        if baseline is None:
            return None
        return _median(
            baseline.runs[number][1].first.first_token_s / run.first.first_token_s
            for number, (_, run) in self.runs.items()
            if number in baseline.runs
        )

    def _prompts_equal(self) -> bool | None:
        """Whether the system's own prompt is the service's; ``None`` where it does not tell."""
        told = [
            (asked.prompt_token_ids, prompt)
            for case, run in self.runs.values()
            for asked, prompt in zip((run.first, run.second), case.prompts, strict=False)
            if asked is not None and asked.prompt_token_ids is not None
        ]
        return all(own == prompt for own, prompt in told) if told else None

    def _tokens_equal(self, baseline: Cell | None) -> str | None:
        """``"n/m"``: of m tokens of first and second answers, n before the first difference."""
        if baseline is None:
            return None
        same = every = 0
        for number, (_, run) in self.runs.items():
            if number not in baseline.runs:
                continue
            theirs = baseline.runs[number][1]
            for a, b in ((run.first, theirs.first), (run.second, theirs.second)):
                if a is None or b is None:
                    continue
                same += common(a.token_ids, b.token_ids)
                every += max(len(a.token_ids), len(b.token_ids))
        return f"{same}/{every}" if every else None


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common head of two lists."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Rows of all cells that have run or were skipped."""
    baselines = {
        (cell.checkpoint, cell.tokens): cell
        for cell in cells
        if cell.system == BASELINE and cell.runs
    }
    return [
        cell.row(baselines.get((cell.checkpoint, cell.tokens)))
        for cell in cells
        if cell.runs or cell.skipped
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """What a reader compares, one line per row."""
    return tables.markdown(HEADER, [_line(row) for row in found])


def _line(row: dict[str, Any]) -> list[object]:
    head = [row["system"], row["mode"], row["video_tokens"]]
    if row["first_token_s"] is None:
        return [*head, f"skipped: {row['skipped']}", *[None] * (len(HEADER) - 4)]
    first = row["first_token_s"]
    second = row["second_first_token_s"]
    share = None if second is None else f"{second / first:.1%}"
    return [
        *head,
        first,
        row["speedup_over_vllm"],
        row["first_cpu_s"],
        second,
        share,
        row["third_of_five_s"],
        row["upload_s"],
        row["peak_rss_bytes"] / 1e9,
        row["density"],
        row["kept_mass"],
        row["tokens_equal"],
    ]


def stage_table(found: Sequence[dict[str, Any]]) -> str:
    """Seconds by stage of each row that has stages."""
    measured = [row for row in found if row["stages"]]
    names = list(dict.fromkeys(name for row in measured for name in row["stages"]))
    return tables.markdown(
        ("system", "mode", "video tokens", *names),
        [
            [row["system"], row["mode"], row["video_tokens"], *map(row["stages"].get, names)]
            for row in measured
        ],
    )


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """First-token time and its ratio to vLLM alone over the length, per checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in found if row["first_token_s"] is not None]
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in measured))
    figure = Figure(figsize=(13, 5 * max(1, len(checkpoints))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(1, len(checkpoints)), 2, squeeze=False)
    for checkpoint, (seconds, ratio) in zip(checkpoints, panels, strict=False):
        mine = [row for row in measured if row["checkpoint"] == checkpoint]
        for name in dict.fromkeys((row["system"], row["mode"]) for row in mine):
            line = [row for row in mine if (row["system"], row["mode"]) == name]
            tokens = [row["video_tokens"] for row in line]
            label = name[0] if name[0] in (BASELINE, "transformers") else ", ".join(name)
            seconds.plot(tokens, [row["first_token_s"] for row in line], "o-", label=label)
            known = [row for row in line if row["speedup_over_vllm"] is not None]
            ratio.plot(
                [row["video_tokens"] for row in known],
                [row["speedup_over_vllm"] for row in known],
                "o-",
                label=label,
            )
        seconds.set(title=f"{checkpoint}: question to first token, s", yscale="log")
        ratio.set(title="vLLM alone's time over this one's")
        for axes in (seconds, ratio):
            ticks = sorted({row["video_tokens"] for row in mine})
            axes.set(xlabel="video tokens", xscale="log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        seconds.legend()
    figure.savefig(path, dpi=110)


def _median(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return round(median(known), 4) if known else None


def _stages(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
