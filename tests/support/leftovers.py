"""What processes leave on a machine when they end: shared memory, files, sockets."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")


def shared_memory_of(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files of shared memory, semaphores among them, that processes have mapped."""
    found = set()
    for process in processes:
        with suppress(psutil.Error, OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                path = Path(line.split(maxsplit=5)[-1])
                if path.parent == SHARED_MEMORY and "(deleted)" not in path.name:
                    found.add(path)
    return found


def still_there(paths: Iterable[Path], timeout_s: float = 10.0) -> set[Path]:
    """Which of these files are not gone in time: the last process may be removing them."""
    deadline = time.monotonic() + timeout_s
    while (left := {path for path in paths if path.exists()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of sockets, as pytest's does not."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        yield Path(name)
