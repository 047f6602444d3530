"""Memory and time of processes and all that they start, as the kernel counts them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil


def pss_bytes(pid: int) -> int:
    """Proportional set size: what n processes share counts a n-th in each. 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tree(pid: int, leave_out: str = "") -> list[int]:
    """A process and its descendants, without those whose command line contains ``leave_out``.

    What they have started is left out too.
    """
    found: list[int] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        waiting = [psutil.Process(pid)]
        while waiting:
            process = waiting.pop()
            with contextlib.suppress(psutil.NoSuchProcess):
                if leave_out and any(leave_out in part for part in process.cmdline()):
                    continue
                found.append(process.pid)
                waiting += process.children()
    return found


class PeakMemory:
    """Samples the memory of a process tree in a thread, inside a ``with`` block.

    Args:
        pids: the processes to add up, asked for at every sample.
        interval_s: between two samples.

    Attributes:
        peak: largest sum so far, bytes.
        samples: how many were taken.
    """

    def __init__(self, pids: Callable[[], list[int]], interval_s: float = 0.2) -> None:
        self._pids, self._interval_s = pids, interval_s
        self.peak = self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            start = time.monotonic()
            self.peak = max(self.peak, sum(map(pss_bytes, self._pids())))
            self.samples += 1
            # A sample of big processes takes a while; it must not take their cores.
            if self._stop.wait(max(self._interval_s, 30 * (time.monotonic() - start))):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
