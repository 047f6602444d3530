"""Memory of a process tree over time: the sum of all proportional set sizes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from benchmarks.processes import pss_bytes, tree

Sample = tuple[float, int]
"""Seconds after the start, bytes."""


def tree_bytes(pid: int) -> int:
    """PSS of a process and all its descendants: what they share counts once."""
    return sum(map(pss_bytes, tree(pid)))


class MemoryLog:
    """Samples while inside ``with``.

    Args:
        pid: root of the tree.
        every_s: between samples; reading one makes the kernel walk all page tables.

    Attributes:
        samples: so far.
    """

    def __init__(
        self, pid: int, every_s: float = 5.0, read: Callable[[int], int] = tree_bytes
    ) -> None:
        self._pid, self._every_s, self._read = pid, every_s, read
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[Sample] = []

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

    def _run(self) -> None:
        while True:
            self.samples.append((time.monotonic() - self._begin, self._read(self._pid)))
            if self._stop.wait(self._every_s):
                return


def slope(samples: Sequence[Sample]) -> float | None:
    """Bytes per minute over the second half, by least squares; ``None`` of fewer than three."""
    late = samples[len(samples) // 2 :]
    if len(late) < 3:
        return None
    seconds, sizes = np.array(late, dtype=float).T
    return float(np.polyfit(seconds, sizes, 1)[0] * 60)
