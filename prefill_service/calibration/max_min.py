"""The max-min rule: which epsilon each head gets, so that all together attend as many keys.

Of every head two curves are known, density and kept mass as functions of epsilon. The worst head's
kept mass is to be as large as the budget allows (max-min, S-HPLB, arXiv 2603.10353):

1. For a *water level* of kept mass each head takes the largest epsilon that keeps so much: its
   cheapest way there. Where a smaller epsilon attends no more keys, it takes that one.
2. What the heads attend together grows with the level; bisection finds the highest one that the
   budget pays for. It is never below the worst head's kept mass at the uniform epsilon: there all
   heads reach it already.
3. A head whose curve is flat at that level makes the sum jump, which leaves keys unspent. They go
   to all heads in proportion: towards the epsilons of the level just above.

With weights the level is one of *weighted lost mass*, ``weight * (1 - kept mass)``, but no head
falls below the uniform epsilon's worst.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_HALVINGS = 50
WEIGHT_LIMIT = 2.0
"""A layer weighs at most so much more or less than the typical one: its measure is a rough one."""


@dataclass(frozen=True, slots=True)
class BudgetCurves:
    """Measured curves of all heads; made by ``measured_curves``.

    Attributes:
        epsilons: [layers, kv_heads, points] ascending from 0, where attention is exact.
        density: [layers, kv_heads, points] attended over causal keys; does not rise.
        kept_mass: [layers, kv_heads, points]; does not rise. Linear between points.
    """

    epsilons: np.ndarray
    density: np.ndarray
    kept_mass: np.ndarray

    def density_at(self, epsilons: np.ndarray) -> np.ndarray:
        """[layers, kv_heads] at an epsilon of each head, [layers, kv_heads]."""
        return self.interpolate(self.density, epsilons)

    def cheapest(self, target: np.ndarray) -> np.ndarray:
        """[layers, kv_heads] epsilons with the fewest keys for ``target`` kept mass of each."""
        largest = self._last(self.kept_mass, target)
        return self._first(self.density, self.density_at(largest))

    def interpolate(self, curves: np.ndarray, epsilons: np.ndarray) -> np.ndarray:
        """[layers, kv_heads] value of each head's curve at its epsilon."""
        points = curves.shape[-1]
        heads = zip(
            epsilons.flat,
            self.epsilons.reshape(-1, points),
            curves.reshape(-1, points),
            strict=True,
        )
        return np.reshape([np.interp(*head) for head in heads], epsilons.shape)

    def _last(self, curves: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Largest epsilon at which a falling curve is not below its value."""
        end = curves.shape[-1] - 1
        before = np.maximum((curves >= values[..., None]).sum(-1) - 1, 0)
        return self._between(curves, values, before, np.minimum(before + 1, end))

    def _first(self, curves: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Smallest epsilon at which a falling curve is not above its value."""
        end = curves.shape[-1] - 1
        after = np.minimum((curves > values[..., None]).sum(-1), end)
        return self._between(curves, values, np.maximum(after - 1, 0), after)

    def _between(
        self, curves: np.ndarray, values: np.ndarray, before: np.ndarray, after: np.ndarray
    ) -> np.ndarray:
        high = _pick(curves, before)
        low = _pick(curves, after)
        drop = high - low
        share = np.where(drop > 0, (high - values) / np.where(drop > 0, drop, 1.0), 0.0).clip(0, 1)
        start = _pick(self.epsilons, before)
        end = _pick(self.epsilons, after)
        found: np.ndarray = start + share * (end - start)
        return found


def _pick(curves: np.ndarray, index: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.take_along_axis(curves, index[..., None], -1)[..., 0]
    return found


def measured_curves(
    epsilons: np.ndarray, density: np.ndarray, kept_mass: np.ndarray
) -> BudgetCurves:
    """Curves from measurements.

    What noise lets rise is held level: the density of a larger epsilon is not above, and the kept
    mass neither. Exact attention, epsilon 0, is known without measuring.

    Args:
        epsilons: [layers, kv_heads, points] in any order, more than 0.
        density, kept_mass: of the same shape.

    Raises:
        ValueError: no points, an epsilon that is not above 0, or unequal shapes.
    """
    if epsilons.ndim != 3 or not epsilons.size or not epsilons.min() > 0:
        raise ValueError(
            f"epsilons of shape {epsilons.shape} from {epsilons.min(initial=np.inf)}; "
            "expected [layers, kv_heads, points] above 0"
        )
    for name, curve in (("density", density), ("kept_mass", kept_mass)):
        if curve.shape != epsilons.shape:
            raise ValueError(f"{name} has shape {curve.shape}; expected {epsilons.shape}")
    order = epsilons.argsort(-1)
    exact = np.ones((*epsilons.shape[:2], 1))
    falling = [
        np.minimum.accumulate(np.concatenate([exact, np.take_along_axis(curve, order, -1)], -1), -1)
        for curve in (density, kept_mass)
    ]
    ascending = np.take_along_axis(epsilons, order, -1)
    return BudgetCurves(np.concatenate([0 * exact, ascending], -1), *falling)


def assign_epsilons(
    curves: BudgetCurves, budget: float, floor: float, weights: np.ndarray | None = None
) -> np.ndarray:
    """Epsilons that make the worst head's kept mass the largest at a total density.

    Args:
        curves: of all heads.
        budget: sum of all heads' densities that may not be exceeded; all of it is used unless
            every head keeps all its mass for less.
        floor: kept mass that no head falls below: the worst head's at the uniform epsilon.
        weights: [layers] of lost mass; ``None`` weighs all alike.

    Returns:
        [layers, kv_heads].

    Raises:
        ValueError: the budget does not pay for the floor.
    """
    layers, heads = curves.density.shape[:2]
    weight = np.ones((layers, 1)) if weights is None else weights.reshape(layers, 1)

    def at(level: float) -> np.ndarray:
        target = np.broadcast_to(np.maximum(floor, 1 - level / weight), (layers, heads))
        return curves.cheapest(target)

    def pays(epsilons: np.ndarray) -> bool:
        return float(curves.density_at(epsilons).sum()) <= budget

    if pays(best := at(0.0)):
        return best
    low = 0.0
    high = float(weight.max()) * (1 - floor)
    if not pays(paid := at(high)):
        least = float(curves.density_at(paid).sum())
        raise ValueError(
            f"a total density of {budget:.6g} does not pay for a kept mass of {floor:.6g}, "
            f"which takes {least:.6g}"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if pays(at(middle)) else (middle, high)
    paid = at(high)
    beyond = at(low)  # beyond is nowhere the larger epsilon
    nearest = 0.0
    farthest = 1.0
    for _ in range(_HALVINGS):
        share = (nearest + farthest) / 2
        between = paid + share * (beyond - paid)
        nearest, farthest = (share, farthest) if pays(between) else (nearest, share)
    epsilons: np.ndarray = paid + nearest * (beyond - paid)
    return epsilons


def layer_weights(sensitivity: np.ndarray) -> np.ndarray:
    """[layers] weights of lost mass from the layers' sensitivities (after SPD, arXiv 2502.20727).

    Sensitivity over its geometric mean, at most ``WEIGHT_LIMIT`` and at least its inverse. Layers
    of which nothing shows weigh least.
    """
    known = sensitivity[sensitivity > 0]
    if not len(known):
        return np.ones_like(sensitivity)
    typical = np.exp(np.log(known).mean())
    weights: np.ndarray = (sensitivity / typical).clip(1 / WEIGHT_LIMIT, WEIGHT_LIMIT)
    return weights
