"""Memory and time of processes and all that they start, as the kernel counts them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

Sample = tuple[float, int]
"""Seconds after the start, bytes."""

_GENTLE = 30
"""A sample of big processes takes a while; this many times as long is waited until the next."""


def end_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, which stops the services it has started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def pss_bytes(pid: int) -> int:
    """Proportional set size: what n processes share counts a n-th in each. 0 if it is gone."""
    return _kib(pid, "smaps_rollup", ("Pss:",))


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of one process; 0 if it is gone."""
    return _kib(pid, "status", ("RssAnon:",))


def shared_bytes(pid: int) -> int:
    """One process's proportional share of files and shared memory; 0 if it is gone."""
    return _kib(pid, "smaps_rollup", ("Pss_File:", "Pss_Shmem:"))


def _kib(pid: int, name: str, fields: tuple[str, ...]) -> int:
    try:
        text = Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # ended, or a zombie
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(fields))


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


def tree_bytes(pid: int, leave_out: str = "") -> int:
    """PSS of a process and all its descendants (``tree``): what they share counts once."""
    return sum(map(pss_bytes, tree(pid, leave_out)))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process tree so far, of what has ended in it too."""
    total = 0.0
    for member in tree(pid):
        with contextlib.suppress(psutil.Error):
            # Own and reaped children's, user and system.
            total += sum(psutil.Process(member).cpu_times()[:4])
    return total


class MemoryLog:
    """Reads memory in a thread, at once and then regularly, inside a ``with`` block.

    Args:
        read: bytes.
        every_s: between two samples, or more where reading takes long.
        at_end: bytes that are read once, at the end, and added to the peak.

    Attributes:
        samples: so far.
    """

    def __init__(
        self,
        read: Callable[[], int],
        every_s: float = 0.2,
        at_end: Callable[[], int] = lambda: 0,
    ) -> None:
        self._read = read
        self._every_s = every_s
        self._at_end = at_end
        self._added = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[Sample] = []

    @property
    def peak(self) -> int:
        """Largest sample so far, bytes, and what was there at the end."""
        return max((size for _, size in self.samples), default=0) + self._added

    def __enter__(self) -> Self:
        self._begin = time.monotonic()
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
        self._added = self._at_end()

    def _run(self) -> None:
        while True:
            start = time.monotonic()
            self.samples.append((start - self._begin, self._read()))
            spent = time.monotonic() - start
            if self._stop.wait(max(self._every_s, _GENTLE * spent)):
                return


def memory_watch(pid: int) -> MemoryLog:
    """Peak memory of a process tree, cheaply.

    Anonymous memory, which is what comes and goes, is sampled and added up. What processes share
    (libraries, KV pages) counts once: each one's proportional share is added, as it is at the end,
    since reading it makes the kernel walk all page tables for too long.
    """
    return MemoryLog(
        lambda: sum(map(anonymous_bytes, tree(pid))),
        at_end=lambda: sum(map(shared_bytes, tree(pid))),
    )
