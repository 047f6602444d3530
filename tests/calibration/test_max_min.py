"""The max-min rule: the budget is conserved, the worst head never falls, nothing better exists."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.calibration.max_min import (
    WEIGHT_LIMIT,
    BudgetCurves,
    assign_epsilons,
    layer_weights,
    measured_curves,
)

GRID = np.array([0.04, 0.08, 0.15, 0.25, 0.4])
BASE = 0.15
TINY = 1e-9


def kept_mass_at(curves: BudgetCurves, epsilons: np.ndarray) -> np.ndarray:
    """[layers, kv_heads] kept mass at an epsilon of each head."""
    return curves.interpolate(curves.kept_mass, epsilons)


def random_curves(seed: int) -> BudgetCurves:
    """Noisy curves of random heads; some have stretches on which nothing changes."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 6)), int(rng.integers(1, 5)), len(GRID))
    curves = []
    for power in (3, 1):
        steps = rng.random(shape) ** power * (rng.random(shape) > 0.3)
        falling = 1 - np.cumsum(steps, -1) / rng.uniform(1, 20, (*shape[:2], 1)) / len(GRID)
        curves.append(falling + rng.normal(0, 0.01, shape) * (rng.random() > 0.5))
    return curves_of(*(curve.clip(0.01, 1) for curve in curves))


def curves_of(density: np.ndarray, kept_mass: np.ndarray) -> BudgetCurves:
    """At the epsilons of the grid, backwards: their order is nothing to rely on."""
    epsilons = np.broadcast_to(GRID, density.shape)
    return measured_curves(*(x[..., ::-1] for x in (epsilons, density, kept_mass)))


def uniform(curves: BudgetCurves) -> tuple[float, float]:
    """Total density and worst kept mass where all heads have the base epsilon."""
    same = np.full(curves.density.shape[:2], BASE)
    return float(curves.density_at(same).sum()), float(kept_mass_at(curves, same).min())


@pytest.mark.parametrize("seed", range(60))
def test_budget_is_conserved_and_the_worst_head_never_falls(seed: int) -> None:
    curves = random_curves(seed)
    budget, worst = uniform(curves)
    weights = None
    if seed % 2:
        sensitivity = np.random.default_rng(seed).random(len(curves.density))
        weights = layer_weights(sensitivity)
    epsilons = assign_epsilons(curves, budget, worst, weights)
    spent = float(curves.density_at(epsilons).sum())
    kept = kept_mass_at(curves, epsilons)
    assert spent <= budget + TINY
    assert kept.min() >= worst - TINY
    assert ((epsilons >= 0) & (epsilons <= GRID[-1])).all()
    # What is left could only buy mass that no measurement says is missing.
    assert spent >= 0.999 * budget or kept.min() >= 1 - TINY
    if weights is None:
        # Any higher level for all heads costs more, whichever way it is reached.
        higher = np.full(kept.shape, min(1.0, kept.min() + 1e-6))
        cost = float(curves.density_at(curves.cheapest(higher)).sum())
        assert cost > budget - TINY or kept.min() >= 1 - TINY


@pytest.mark.parametrize("seed", range(20))
def test_no_random_assignment_has_a_better_worst_head(seed: int) -> None:
    curves = random_curves(seed)
    budget, worst = uniform(curves)
    best = kept_mass_at(curves, assign_epsilons(curves, budget, worst)).min()
    rng = np.random.default_rng(seed)
    for _ in range(200):
        other = rng.uniform(0, GRID[-1], curves.density.shape[:2])
        if curves.density_at(other).sum() <= budget:
            assert kept_mass_at(curves, other).min() <= best + 1e-6


def test_an_easy_head_pays_for_a_hard_one() -> None:
    # The easy one loses nothing on a third of its keys; the hard one lacks a fifth of its mass.
    density = np.array([[[0.9, 0.8, 0.6, 0.4, 0.2], [0.9, 0.8, 0.6, 0.4, 0.2]]])
    kept_mass = np.array([[[1.0, 1.0, 0.99, 0.98, 0.97], [0.95, 0.9, 0.8, 0.6, 0.3]]])
    curves = curves_of(density, kept_mass)
    easy, hard = assign_epsilons(curves, 1.2, 0.8)[0]
    assert easy > BASE > hard
    assert curves.density_at(np.array([[easy, hard]])).sum() == pytest.approx(1.2)
    assert kept_mass_at(curves, np.array([[easy, hard]])).min() > 0.93


def test_where_a_larger_epsilon_saves_nothing_the_smaller_one_is_taken() -> None:
    flat = np.array([[[0.3, 0.3, 0.3, 0.3, 0.3]]])  # what the head keeps by place is all
    curves = curves_of(flat, np.array([[[0.99, 0.98, 0.97, 0.96, 0.95]]]))
    assert assign_epsilons(curves, 0.3, 0.97)[0, 0] == pytest.approx(GRID[0])


def test_exact_heads_are_left_at_what_costs_nothing() -> None:
    curves = curves_of(np.ones((2, 2, 5)), np.ones((2, 2, 5)))
    assert (assign_epsilons(curves, 4.0, 1.0) == 0).all()  # dense at any epsilon


def test_weights_move_keys_to_the_sensitive_layer() -> None:
    density = np.tile([0.9, 0.8, 0.6, 0.4, 0.2], (2, 1, 1))
    kept_mass = np.tile([0.95, 0.9, 0.8, 0.7, 0.6], (2, 1, 1))
    kept_mass[1] += 0.02  # so that there is room above the floor
    curves = curves_of(density, kept_mass)
    budget, worst = uniform(curves)
    plain = assign_epsilons(curves, budget, worst)
    weighed = assign_epsilons(curves, budget, worst, layer_weights(np.array([0.3, 0.1])))
    assert weighed[0, 0] < plain[0, 0]
    assert kept_mass_at(curves, weighed).min() >= worst - TINY


def test_a_budget_that_does_not_pay_is_named() -> None:
    curves = random_curves(3)
    with pytest.raises(ValueError, match=r"density of 0\.001 does not pay for a kept mass of 0\.9"):
        assign_epsilons(curves, 0.001, 0.9)


@pytest.mark.parametrize(
    ("epsilons", "shape", "message"),
    [
        ([[[0.0, 0.1]]], (1, 1, 2), r"shape \(1, 1, 2\) from 0.0; expected .* above 0"),
        ([[[0.1, np.nan]]], (1, 1, 2), r"from nan; expected"),
        ([[[]]], (1, 1, 0), r"shape \(1, 1, 0\) from inf"),
        ([0.1, 0.2], (1, 1, 2), r"shape \(2,\) from 0.1"),
        ([[[0.1, 0.2]]], (1, 1, 3), r"density has shape \(1, 1, 3\); expected \(1, 1, 2\)"),
    ],
)
def test_measurements_that_are_none_are_refused(
    epsilons: list[object], shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measured_curves(np.array(epsilons), np.ones(shape), np.ones(shape))


def test_weights_are_bounded_and_relative() -> None:
    weights = layer_weights(np.array([1e-3, 2e-3, 1.0, 0.0]))
    assert weights.max() <= WEIGHT_LIMIT
    assert weights.min() >= 1 / WEIGHT_LIMIT
    assert (np.argsort(weights[:3]) == [0, 1, 2]).all()
    assert weights[3] == 1 / WEIGHT_LIMIT
    assert (layer_weights(np.zeros(3)) == 1).all()
