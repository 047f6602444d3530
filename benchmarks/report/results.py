"""The result files, read once, and how their numbers are printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from benchmarks import tables

Row = dict[str, Any]

LARGE_CHECKPOINT = "bench-qwen3-vl"
NEEDLE_CHECKPOINT = "needle-qwen3-vl"


@cache
def content(name: str) -> Any:
    """The parsed ``benchmarks/results/NAME.json``."""
    return json.loads((tables.RESULTS / f"{name}.json").read_text())


def rows(name: str) -> list[Row]:
    """The rows of a result file, whether it is a list or an object that has them."""
    found = content(name)
    listed: list[Row] = found["rows"] if isinstance(found, dict) else found
    return listed


def settings(name: str) -> Row:
    """Date, versions and machine of a result file; lists keep theirs in ``NAME.meta.json``."""
    found = content(name)
    noted: Row = found["settings"] if isinstance(found, dict) else content(f"{name}.meta")
    return noted


def only(found: list[Row], **wanted: Any) -> list[Row]:
    """The rows that have all of the given values."""
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def one(found: list[Row], **wanted: Any) -> Row | None:
    """The row that has all of the given values, or nothing."""
    return next(iter(only(found, **wanted)), None)


def seconds(value: float | None) -> str:
    """Two places after the point, one from ten on; an empty cell where nothing was measured."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def share(value: float | None) -> str:
    """A share of one as percent, with a place after the point where it is below ten."""
    if value is None:
        return ""
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def span(values: Sequence[float], form: str) -> str:
    """The least and the largest value, or one where they are printed alike."""
    least, most = (format(pick(values), form) for pick in (min, max))
    return least if least == most else f"{least} to {most}"
