"""The slope of a noisy measurement over time, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOWS = 12
"""Neighbouring samples are alike: the median of each window counts as one observation."""

# Two-sided 95 % points of Student's distribution for 1 to 10 degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True, slots=True)
class Trend:
    """A least-squares slope, in units of the values per hour, with its 95 % interval."""

    per_hour: float
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether the interval contains 0."""
        return self.low <= 0.0 <= self.high


def trend(seconds: Sequence[float], values: Sequence[float]) -> Trend | None:
    """The slope through the medians of ``WINDOWS`` equal windows of time.

    Returns:
        Nothing where fewer than three windows have a sample.
    """
    at = np.asarray(seconds, dtype=float) / 3600
    sizes = np.asarray(values, dtype=float)
    if len(at) < 3:
        return None
    edges = np.linspace(at[0], at[-1], WINDOWS + 1)
    number = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, WINDOWS - 1)
    present = np.unique(number)
    if len(present) < 3:
        return None
    x = np.array([at[number == window].mean() for window in present])
    y = np.array([np.median(sizes[number == window]) for window in present])
    spread = x - x.mean()
    slope = float(spread @ y / (spread @ spread))
    residual = y - y.mean() - slope * spread
    freedom = len(x) - 2
    error = math.sqrt(float(residual @ residual) / freedom / float(spread @ spread))
    half = _STUDENT[freedom - 1] * error
    return Trend(per_hour=slope, low=slope - half, high=slope + half)
