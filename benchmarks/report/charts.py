"""Charts of the documents, as SVG: drawn from the result files, equal byte for byte each time."""

from __future__ import annotations

import io
from typing import Any

from benchmarks.report.results import LARGE_CHECKPOINT, Row, only, rows

_INK = "#57606a"
_LINES = (
    ("vLLM alone", "vllm", "exact", "#8c959f", "o"),
    ("exact: the same tokens", "ours", "exact", "#0969da", "s"),
    ("balanced: the default", "ours", "balanced", "#1a7f37", "D"),
)


def first_token() -> str:
    """Seconds from a question to its first token over the video's length, as an SVG document."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": "prefill-service",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for label, system, mode, color, marker in _LINES:
            line = _measured(system, mode)
            tokens = [row["video_tokens"] for row in line]
            times = [row["first_token_s"] for row in line]
            axes.plot(tokens, times, color=color, marker=marker, linewidth=2, label=label)
        ticks = [row["video_tokens"] for row in _measured("vllm", "exact")]
        axes.set_xticks(ticks, [f"{tick / 1000:.0f} K" for tick in ticks])
        axes.set_xlabel("video tokens")
        axes.set_ylabel("seconds to first token")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return drawn.getvalue()


def _measured(system: str, mode: str) -> list[Row]:
    """The rows of one system and mode at the lengths that vLLM alone was measured at, too."""
    found = only(rows("service-cpu"), checkpoint=LARGE_CHECKPOINT, system=system, mode=mode)
    return [row for row in found if row["speedup_over_vllm"] is not None]
