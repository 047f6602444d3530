"""A service in the sandbox that can be killed and started again on the same data directory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.chaos.clock import Clock
from benchmarks.chaos.sandbox import Sandbox
from tools.service_process import ServiceProcess

START_S = 900.0


class RunningService:
    """One service after the other, all with the same arguments and data.

    Args:
        logs: folder that gets the log of each of them.

    Attributes:
        unclean: processes that had to be killed after an orderly stop.
    """

    def __init__(
        self, arguments: Sequence[str], sandbox: Sandbox, clock: Clock, logs: Path
    ) -> None:
        self._arguments = [*arguments, "--data-dir", str(sandbox.data)]
        self._sandbox = sandbox
        self._environment = sandbox.environment(**clock.environment)
        self._logs = logs
        self._numbers = itertools.count()
        self._process: ServiceProcess | None = None
        self.unclean: list[str] = []

    @property
    def pid(self) -> int:
        """Process id of the front end."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        """``host:port`` of the one that runs."""
        assert self._process is not None
        return self._process.address

    async def start(self) -> None:
        """Start one and wait until it serves.

        Raises:
            RuntimeError: it does not.
        """
        self._process = ServiceProcess(
            self._arguments,
            self._logs / f"service-{next(self._numbers)}.log",
            launcher=self._sandbox.launcher,
            environment=self._environment,
        )
        self._process.__enter__()
        await asyncio.to_thread(self._process.wait_ready, START_S, lambda _: None)

    def check(self) -> None:
        """Raise RuntimeError if it has ended by itself."""
        assert self._process is not None
        self._process.check()

    async def stop(self) -> None:
        """End it in an orderly way."""
        if self._process is not None:
            self.unclean += await asyncio.to_thread(self._process.stop)
            self._process = None

    async def restart(self) -> None:
        """Start a new one, after the death of the one before."""
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        await self.start()
