"""Markdown tables and result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_LOAD_BEFORE = os.getloadavg()[0]  # as the benchmark began: at its end it is its own load


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats get three places after the point."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def settings(**extra: Any) -> dict[str, Any]:
    """Date, versions and machine, for a result file."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": round(_LOAD_BEFORE, 2),
        **extra,
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write(path: Path, content: Any) -> None:
    """JSON; the elements of a list, or of a dict's lists, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        parts = (f"{json.dumps(name)}: {_lines(value)}" for name, value in content.items())
        text = "{\n" + ",\n".join(parts) + "\n}"
    else:
        text = _lines(content)
    path.write_text(text + "\n")


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(element) for element in value) + "\n]"
