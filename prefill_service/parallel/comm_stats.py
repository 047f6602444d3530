"""What collectives moved and how long a rank waited for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

CONTROL = "agree"
"""Agreements of a few bytes: counted, but no part of what an exchange moves."""


@dataclass(frozen=True, slots=True)
class CollectiveUse:
    """The use of one kind of collective on one rank, or over several.

    Attributes:
        calls: how often it was started.
        bytes_received: from other ranks.
        seconds: of the host, in starting it and waiting for it. What is hidden behind computation
            does not count, and on CUDA neither does what the stream waits for.
    """

    calls: int = 0
    bytes_received: int = 0
    seconds: float = 0.0

    def __add__(self, other: CollectiveUse) -> CollectiveUse:
        """The sums of both uses' numbers."""
        return CollectiveUse(
            calls=self.calls + other.calls,
            bytes_received=self.bytes_received + other.bytes_received,
            seconds=self.seconds + other.seconds,
        )


@dataclass(slots=True)
class CommStats:
    """All collectives of one rank, by name. Every group and sub-group of a rank shares it."""

    uses: dict[str, CollectiveUse] = field(default_factory=dict)

    @property
    def bytes_received(self) -> int:
        """Bytes received in all collectives but agreements."""
        return moved(self.uses)

    @property
    def seconds(self) -> float:
        """Spent so far in starting collectives and waiting for them, agreements included."""
        return sum(use.seconds for use in self.uses.values())

    def received(self, name: str, size: int) -> None:
        """Note a started collective that brings ``size`` bytes from other ranks."""
        self._add(name, CollectiveUse(1, size))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, CollectiveUse(seconds=time.perf_counter() - start))

    def since(self, before: Mapping[str, CollectiveUse]) -> dict[str, CollectiveUse]:
        """What came after ``before``, a copy of ``uses``."""
        nothing = CollectiveUse()
        found = {}
        for name, use in self.uses.items():
            past = before.get(name, nothing)
            found[name] = CollectiveUse(
                use.calls - past.calls,
                use.bytes_received - past.bytes_received,
                use.seconds - past.seconds,
            )
        return {name: use for name, use in found.items() if use.calls}

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Count from nothing inside, and go on afterwards where it was before.

        A task that runs while another one is paused is counted apart from it.
        """
        before, self.uses = self.uses, {}
        try:
            yield
        finally:
            self.uses = before

    def _add(self, name: str, use: CollectiveUse) -> None:
        self.uses[name] = self.uses.get(name, CollectiveUse()) + use


def moved(uses: Mapping[str, CollectiveUse]) -> int:
    """Bytes received in all but agreements."""
    return sum(use.bytes_received for name, use in uses.items() if name != CONTROL)


def total(ranks: Iterable[Mapping[str, CollectiveUse]]) -> dict[str, CollectiveUse]:
    """Calls and bytes of all ranks, and the time of the slowest one, by name."""
    found: dict[str, CollectiveUse] = {}
    for uses in ranks:
        for name, use in uses.items():
            so_far = found.get(name, CollectiveUse())
            slowest = max(so_far.seconds, use.seconds)
            calls = so_far.calls + use.calls
            received = so_far.bytes_received + use.bytes_received
            found[name] = CollectiveUse(calls, received, slowest)
    return found
