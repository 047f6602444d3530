"""The quality dial: how much attention mass a prefill may misplace, and the floor it must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from prefill_service.attention.head_budgets import HeadBudgets

FLOOR_TOLERANCE = 1e-6
"""Verification's own float32 rounding, which must not miss a floor of 1."""

_ROW_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class QualityStep:
    """What a step of the dial stands for (docs/attention.md says why these values).

    Attributes:
        epsilon: attention mass that selection may misplace; ``None``: the request says.
        row_limit: loss in one row, by either of its two parts, from which a block is kept whatever
            its mean is. ``None``: half the epsilon, so that no row loses more than epsilon in a
            block.
    """

    epsilon: float | None
    row_limit: float | None = None

    def row_limit_at(self, epsilon: float) -> float:
        """The limit of a head with that epsilon."""
        return _ROW_SHARE * epsilon if self.row_limit is None else self.row_limit


ASKED_STEP = QualityStep(epsilon=None)
"""The step of an explicit epsilon."""


class QualityDial(StrEnum):
    """A dial without steps. A step is one line, ``NAME = "name", QualityStep(...)``."""

    _value_: str
    step: QualityStep

    def __new__(cls, name: str, step: QualityStep = ASKED_STEP) -> Self:
        """A string that carries what it stands for."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.step = step
        return member


class Quality(QualityDial):
    """Steps of the dial (``prefill.v1.Quality``); ``CUSTOM`` is an explicit epsilon."""

    EXACT = "exact", QualityStep(epsilon=0.0)
    HIGH = "high", QualityStep(epsilon=0.1, row_limit=0.05)
    BALANCED = "balanced", QualityStep(epsilon=0.2, row_limit=0.05)
    FAST = "fast", QualityStep(epsilon=0.3, row_limit=0.05)
    CUSTOM = "custom", ASKED_STEP


@dataclass(frozen=True, slots=True)
class AttentionPolicy:
    """How one prefix's attention is computed. Made by ``resolve_policy``.

    Attributes:
        quality: step of the dial.
        epsilon: attention mass that may be misplaced, 0 (exact) to below 1.
        min_kept_mass: the floor. A KV head one of whose query heads is measured below it is
            computed again with a smaller epsilon, then densely.
        budgets: how ``epsilon`` is shared among the heads; ``None``: each has the same. What the
            service is configured with, not what a request asks for.
    """

    quality: QualityDial
    epsilon: float
    min_kept_mass: float
    budgets: HeadBudgets | None = None

    @property
    def exact(self) -> bool:
        """Nothing is approximated."""
        return self.epsilon == 0

    def row_limit(self, epsilon: float) -> float:
        """Loss in one row from which a head of that epsilon keeps a block."""
        return self.quality.step.row_limit_at(epsilon)

    @property
    def attention_key(self) -> str:
        """Name for the manifest; part of the prefix id, so that unequal KV has unequal ids."""
        if self.exact:
            return "exact"
        limits = f"row_limit={self.row_limit(self.epsilon)!r},min_kept_mass={self.min_kept_mass!r}"
        name = f"sparse:epsilon={self.epsilon!r},{limits}"
        return f"{name},budgets={self.budgets.digest}" if self.budgets else name

    def with_budgets(self, budgets: HeadBudgets | None) -> AttentionPolicy:
        """The same policy, its epsilon shared among the heads; ``exact`` has none to share."""
        return self if self.exact else replace(self, budgets=budgets)

    def head_epsilons(self, layers: int, kv_heads: int) -> tuple[tuple[float, ...], ...]:
        """The epsilon of every KV head, as [layers][kv_heads].

        Raises:
            ValueError: the budgets are those of another shape.
        """
        if self.budgets is None:
            return ((self.epsilon,) * kv_heads,) * layers
        if self.budgets.shape != (layers, kv_heads):
            raise ValueError(
                f"budgets are of {self.budgets.shape} layers and KV heads; "
                f"expected {(layers, kv_heads)}"
            )
        return self.budgets.at(self.epsilon)


def resolve_policy(
    quality: QualityDial | None = None,
    epsilon: float | None = None,
    min_kept_mass: float | None = None,
) -> AttentionPolicy:
    """Fill in defaults: ``balanced``, and a floor of ``1 - 2 * epsilon``.

    Args:
        quality: step of the dial; ``None`` with an epsilon means ``CUSTOM``.
        epsilon: only without a quality (or with ``CUSTOM``).
        min_kept_mass: floor, 0 to 1; 0 switches it off.

    Raises:
        ValueError: a combination or value that is not accepted, named with what is.
    """
    if epsilon is None:
        quality = quality or Quality.BALANCED
        epsilon = quality.step.epsilon
        if epsilon is None:
            raise ValueError(f"quality {quality} needs an epsilon")
    elif quality not in (None, Quality.CUSTOM):
        raise ValueError(f"epsilon = {epsilon!r} contradicts quality {quality}; set one of them")
    elif not 0 <= epsilon < 1:
        raise ValueError(f"epsilon = {epsilon!r} is not accepted; expected 0 <= epsilon < 1")
    if min_kept_mass is None:
        min_kept_mass = max(0.0, round(1 - 2 * epsilon, 12))
    elif not 0 <= min_kept_mass <= 1:
        raise ValueError(
            f"min_kept_mass = {min_kept_mass!r} is not accepted; expected 0 <= min_kept_mass <= 1"
        )
    if epsilon == 0:
        return AttentionPolicy(Quality.EXACT, 0.0, min(min_kept_mass, 1.0))
    return AttentionPolicy(quality or Quality.CUSTOM, epsilon, min_kept_mass)
