"""How much of a long question vLLM takes in per step, so that short ones beside it go on.

A step of vLLM computes tokens of several requests, and each request waits for the whole step.
What a chunk of a question costs grows with the tokens before it, so that no number of tokens is
right for all of them: the pacer bounds the *time* of a chunk. It learns from the steps themselves
what a unit of work and a step without any prefill take.

Imports nothing of vLLM; ``fair_scheduler`` applies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MEMORY = 0.3
"""Weight of the latest step in the moving averages."""

_FIRST_TOKENS = 64
"""Tokens of a chunk while nothing has been measured."""

_MAX_WITHHELD = 4
"""Steps in a row that leave long prefills out while short ones are taken in whole."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What is left to compute of a request's prompt.

    Attributes:
        context: tokens before it, in vLLM's cache already.
        tokens: how many are left.
    """

    context: int
    tokens: int


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Bounds on one step.

    Attributes:
        request_tokens: most tokens of one request's prompt.
        step_tokens: most tokens of the step; ``None`` for vLLM's own bound.
        withhold_long: whether the running long prefills are left out of the step.
    """

    request_tokens: int
    step_tokens: int | None = None
    withhold_long: bool = False


class PrefillPacer:
    """Bounds chunks of long prefills by the time they take.

    Args:
        step_s: longest step that only takes in prompts.
        share: part of a step's time that long prefills get while other requests are served.
        linear_tokens: keys whose attention costs as much as a token's linear layers.
    """

    def __init__(self, step_s: float, share: float, linear_tokens: float) -> None:
        self._step_s = step_s
        self._share = share
        self._linear_tokens = linear_tokens
        self._unit_s: float | None = None
        self._base_s: float | None = None
        self._withheld = 0

    def work(self, prefill: Prefill, tokens: int) -> float:
        """(query, key) pairs that the next ``tokens`` of a prefill cost, linear layers included."""
        return tokens * (prefill.context + tokens / 2 + self._linear_tokens)

    def is_long(self, prefill: Prefill) -> bool:
        """Whether it takes longer than a step may."""
        return prefill.tokens > self._tokens_in(self._step_s, prefill.context)

    def limit_step(
        self, running: Sequence[Prefill], waiting: Sequence[Prefill], decoding: int
    ) -> StepLimits:
        """Bounds on the next step.

        Args:
            running, waiting: prefills that the step may go on with or begin.
            decoding: requests that are past their prompt.
        """
        prefills = [*running, *waiting]
        longs = [prefill for prefill in prefills if self.is_long(prefill)]
        if not longs:
            self._withheld = 0
            return StepLimits(max((prefill.tokens for prefill in prefills), default=1))
        context = max(prefill.context for prefill in longs)
        whole = max(1, self._tokens_in(self._step_s, context))
        shorts = len(prefills) - len(longs)
        if shorts and self._withheld < _MAX_WITHHELD:
            self._withheld += 1
            return StepLimits(whole, withhold_long=True)
        self._withheld = 0
        if shorts or decoding:
            return StepLimits(max(1, self._tokens_in(self._beside_s(), context) // len(longs)))
        each = max(1, whole // len(longs))
        return StepLimits(each, step_tokens=each * len(longs))

    def learn(self, seconds: float, work: float, decoding: int) -> None:
        """Note what a step took.

        Args:
            seconds: of the whole step.
            work: of its prefills.
            decoding: requests of it that were past their prompt.
        """
        if not work:
            self._base_s = _average(self._base_s, seconds)
            return
        base_s = self._base_s or 0.0 if decoding else 0.0
        self._unit_s = _average(self._unit_s, max(seconds - base_s, seconds / 10) / work)

    def _beside_s(self) -> float:
        """Time of a chunk in a step that serves others, so that it is ``share`` of the step."""
        if self._base_s is None:
            return self._step_s * self._share
        return min(self._step_s, self._base_s * self._share / (1 - self._share))

    def _tokens_in(self, seconds: float, context: int) -> int:
        """Tokens after ``context`` others that take about so long; may be 0."""
        if self._unit_s is None:
            return int(_FIRST_TOKENS * seconds / self._step_s)
        keys = context + self._linear_tokens
        # Solves tokens * (keys + tokens / 2) = seconds / unit_s, see ``work``.
        return int(math.sqrt(keys**2 + 2 * seconds / self._unit_s) - keys)


def _average(average: float | None, value: float) -> float:
    return value if average is None else average + _MEMORY * (value - average)
