"""From measurements to budgets: what is taken, corrected and given up."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.attention.head_budgets import MAX_EPSILON
from prefill_service.calibration.command import format_table
from prefill_service.calibration.fit import fit, grid
from prefill_service.calibration.measure import Measured

BASE = 0.15
NEED = np.array([[0.2, 1.0], [0.6, 3.0]])
"""How fast each head loses mass."""


def world(epsilons: np.ndarray, coupling: float = 0.0) -> Measured:
    """Density and kept mass of heads that, with ``coupling``, suffer from one another."""
    hurt = 1 + coupling * np.abs(epsilons - BASE).mean()
    kept_mass = 1 - NEED * epsilons / (1 + NEED) * hurt
    return Measured(np.exp(-6 * epsilons / (0.2 + NEED)) * hurt, kept_mass)


def measured() -> dict[float, Measured]:
    return {point: world(np.full((2, 2), point)) for point in grid(BASE)}


def test_the_grid_holds_the_uniform_epsilon_and_ends_in_time() -> None:
    assert grid(0.15) == pytest.approx([0.0375, 0.075, 0.1125, 0.15, 0.225, 0.3, 0.45])
    assert 0.9 in grid(0.9)
    assert max(grid(0.9)) == MAX_EPSILON


@pytest.mark.parametrize("coupling", [0.0, 0.1, 0.3])
def test_what_is_taken_holds_where_it_was_measured(coupling: float) -> None:
    found = fit(BASE, measured(), lambda epsilons: world(epsilons, coupling))
    assert found.after.total <= found.before.total
    assert found.after.worst > found.before.worst
    assert found.after.total >= 0.95 * found.before.total
    used = world(found.epsilons, coupling)
    assert (used.density == found.after.density).all()


def test_without_a_gain_the_epsilons_stay_uniform() -> None:
    def always_worse(epsilons: np.ndarray) -> Measured:
        after = world(epsilons)
        return Measured(after.density, after.kept_mass - 0.5)

    found = fit(BASE, measured(), always_worse)
    assert (found.epsilons == BASE).all()
    assert found.after is found.before


def test_the_table_says_before_and_after() -> None:
    found = fit(BASE, measured(), world)
    lines = format_table(found.before, found.after, found.epsilons, [0.25, 0.125]).splitlines()
    assert lines[0].split()[0] == "layer"
    assert len(lines) == 4
    assert lines[2].split()[-1] == "0.1250"
    assert f"{found.before.worst:.4f} -> {found.after.worst:.4f}" in lines[3]
    assert (
        format_table(found.before, found.after, found.epsilons, []).splitlines()[1].endswith(" -")
    )
