"""Threads of the planner's work: the event loop stays free, and what is short never waits for long.

Threads are enough. Tokenizing, most of a plan, holds no GIL. What a request may cost is bounded
before it comes here: frames by the video, tokens by the context. Processor and tokenizer may be
used by several threads at once: nothing of them changes after the first prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

SHORT_TOKENS = 8192
"""Work on more tokens is long: a tenth of a second or more."""

LONG_THREADS = 2

T = TypeVar("T")


class PlannerThreads:
    """One thread for short work, and a few for long."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, thread_name_prefix="planner-short")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="planner-long")

    def close(self) -> None:
        """Let the threads end; what waits for one is cancelled."""
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    async def call(self, tokens: int, function: Callable[..., T], *args: object) -> T:
        """Call a function in a thread; a caller that is cancelled while it waits for one frees it.

        Args:
            tokens: about how many tokens it is about, or as much work as that.
            function: what to call with ``args``.
        """
        pool = self._short if tokens <= SHORT_TOKENS else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, function, *args)
