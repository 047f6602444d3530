"""Work that is done once however many callers ask for it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """The work was stopped before it ended."""


class SingleFlight(Generic[T]):
    """Tasks by key; callers with the same key share one. For one event loop.

    A task goes on when the callers that wait for it are cancelled.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[T]] = {}

    async def join(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Wait for the task of ``key``; begin it with ``work`` if none runs.

        Raises:
            StoppedError: ``stop`` or ``close`` ended the task.
        """
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.create_task(work())
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # it was stopped; the caller is not cancelled
                raise StoppedError from None
            raise

    def is_running(self, key: str) -> bool:
        """Whether a task of ``key`` has begun and not ended."""
        return key in self._tasks

    async def stop(self, key: str) -> None:
        """Cancel the task of ``key``, if one runs, and wait for its end."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Cancel all tasks and wait for their end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, key: str, task: asyncio.Task[T]) -> None:
        self._tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # every caller may be gone; asyncio must not complain
