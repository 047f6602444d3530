"""Notices an engine of vLLM that hangs: its API server answers ``/health`` all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from prefill_service.errors import ServiceError

_SILENCE_S = 5.0
"""Answers that are silent for longer have the engine checked."""


class EngineWatch:
    """Follows the answers under way; where none goes on, has the engine make a token.

    An engine that is slow, or busy with others' questions, makes that token, or sends another
    answer's meanwhile. One that does neither for ``limit_s`` hangs.

    Args:
        limit_s: longest time for one token.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._answers = 0
        self._last_sign = 0.0
        self._check: asyncio.Task[None] | None = None
        self._checked_at = 0.0

    @contextmanager
    def follow(self) -> Iterator[Callable[[], None]]:
        """An answer is under way inside the block; call the value with each sign of it."""
        if not self._answers:
            self.note_sign()
        self._answers += 1
        try:
            yield self.note_sign
        finally:
            self._answers -= 1

    def note_sign(self) -> None:
        """The engine works."""
        self._last_sign = time.monotonic()

    def find_trouble(self, check: Callable[[float], Awaitable[None]]) -> str:
        """Why the engine hangs; empty if it does not. Called now and then, returns at once.

        Args:
            check: makes a token within so many seconds, or raises ``ServiceError``.
        """
        if self._check is not None and self._check.done():
            error = self._check.exception()
            self._check = None
            late = time.monotonic() - self._checked_at >= self._limit_s
            if error is None:
                self.note_sign()
            elif not isinstance(error, ServiceError):
                raise error
            elif late and self._answers and self._last_sign < self._checked_at:
                return error.message
        silent = time.monotonic() - self._last_sign > _SILENCE_S
        if self._check is None and self._answers and silent:
            self._checked_at = time.monotonic()
            self._check = asyncio.ensure_future(check(self._limit_s))
        return ""

    async def close(self) -> None:
        """End a check that is under way."""
        if self._check is not None:
            self._check.cancel()
            await asyncio.wait({self._check})
            self._check = None
