"""From curves to budgets that hold when they are used: assign, measure, correct."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from prefill_service.attention.head_budgets import MAX_EPSILON
from prefill_service.calibration.max_min import assign_epsilons, measured_curves
from prefill_service.calibration.measure import Measured

_GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Epsilons that are measured, relative to the uniform one. No head gets more than the last."""

_ROUNDS = 8
_SPENT = 0.99
"""Share of the budget from which on another round is not worth it."""

_SLACK = 1e-3
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Fit:
    """Budgets, and what was measured with them.

    Attributes:
        epsilons: [layers, kv_heads].
        before, after: with the uniform epsilon, and with ``epsilons``.
    """

    epsilons: np.ndarray
    before: Measured
    after: Measured


def grid(epsilon: float) -> list[float]:
    """Epsilons to measure, ascending, ``epsilon`` among them."""
    return sorted({min(round(factor * epsilon, _DIGITS), MAX_EPSILON) for factor in _GRID})


def fit(
    epsilon: float,
    measured: dict[float, Measured],
    trial: Callable[[np.ndarray], Measured],
    weights: np.ndarray | None = None,
) -> Fit:
    """Share the keys that the uniform ``epsilon`` attends.

    Curves are known at a few points, and a layer's approximation changes what later layers are
    asked, so that they tell only nearly what an assignment does. Hence each is measured, what was
    measured is added to the curves, and the next one is made from them. Only what attends no more
    keys and has no worse worst head is taken, the best of it; without any, epsilons stay uniform.

    Args:
        measured: by the epsilon that all heads had; ``epsilon`` is one of them.
        trial: measures [layers, kv_heads] epsilons.
        weights: [layers] of lost mass (``max_min.layer_weights``).
    """
    before = measured[epsilon]
    shape = before.density.shape
    points = [(np.full(shape, point), found) for point, found in measured.items()]
    best = Fit(np.full(shape, epsilon), before, before)
    budget = before.total
    floor = before.worst
    for _ in range(_ROUNDS):
        curves = measured_curves(
            np.stack([epsilons for epsilons, _ in points], -1),
            np.stack([found.density for _, found in points], -1),
            np.stack([found.kept_mass for _, found in points], -1),
        )
        try:
            epsilons = assign_epsilons(curves, budget, floor, weights)
        except ValueError:
            break  # corrections have asked for more than there is
        epsilons = epsilons.round(_DIGITS).clip(10.0**-_DIGITS)
        after = trial(epsilons)
        points.append((epsilons, after))
        if after.total <= before.total and after.worst >= before.worst:
            if after.worst >= best.after.worst:
                best = Fit(epsilons, before, after)
            if after.total >= _SPENT * before.total:
                break
        if after.total > before.total:
            budget -= _SLACK * before.total
        floor += max(0.0, before.worst - after.worst)
    return best
