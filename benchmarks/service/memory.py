"""Peak memory and CPU time of a process and all it started."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_INTERVAL_S = 0.2


class MemoryWatch:
    """Peak memory of a process tree while inside ``with``.

    Anonymous memory, which is what comes and goes, is sampled five times a second and added up.
    What processes share (libraries, KV pages) counts once: each one's proportional share is added,
    as it is at the end, since reading it makes the kernel walk all page tables for too long.

    Args:
        pid: root of the tree.

    Attributes:
        peak_bytes: set on exit.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._peak_anonymous = 0
        self.peak_bytes = 0

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
        shared = sum(shared_bytes(process.pid) for process in family(self._pid))
        self.peak_bytes = self._peak_anonymous + shared

    def _run(self) -> None:
        while True:
            now = sum(anonymous_bytes(process.pid) for process in family(self._pid))
            self._peak_anonymous = max(self._peak_anonymous, now)
            if self._stop.wait(_INTERVAL_S):
                return


def cpu_seconds(pid: int) -> float:
    """CPU time of a process tree so far, of what has ended in it too."""
    total = 0.0
    for process in family(pid):
        try:
            total += sum(process.cpu_times()[:4])  # own and reaped children's, user and system
        except psutil.Error:
            continue
    return total


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants that run now."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of one process; 0 if it has ended."""
    return _kib(pid, "status", ("RssAnon:",))


def shared_bytes(pid: int) -> int:
    """One process's proportional share of files and shared memory; 0 if it has ended."""
    return _kib(pid, "smaps_rollup", ("Pss_File:", "Pss_Shmem:"))


def _kib(pid: int, name: str, fields: tuple[str, ...]) -> int:
    try:
        text = Path(f"/proc/{pid}/{name}").read_text()
    except OSError:  # ended, or a zombie
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(fields))
