"""Copies between a layer's buffer and where its rows live, in order, beside the computing.

A ``CopyEngine`` has a store for rows off the device and a queue that is worked through in the
order of submission, so that a buffer may be filled again right after what it held was sent away.
There are two: ``file_copies`` for CPU ranks and ``cuda_copies`` for GPUs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from prefill_service.attention_shape import PromptShape
from prefill_service.errors import ServiceError

_PROBE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class HostRows:
    """Address of rows [start, end) of a layer in an engine's store."""

    layer: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy: ``rows`` of a buffer, from ``backing`` if ``to_device``, else to it.

    The backing is rows of the store, or a tensor on the device.
    """

    rows: Tensor
    backing: HostRows | Tensor
    to_device: bool

    @property
    def num_bytes(self) -> int:
        """Bytes that this copy moves."""
        return self.rows.numel() * self.rows.element_size()


@dataclass(slots=True)
class Rate:
    """Bytes per second of one kind of copy; older ones count half at each reading."""

    num_bytes: float = 0.0
    seconds: float = 0.0

    def add(self, num_bytes: int, seconds: float) -> None:
        """Note a copy."""
        self.num_bytes += num_bytes
        self.seconds += seconds

    def read(self) -> float:
        """Bytes per second; infinite as long as nothing took any time."""
        rate = self.num_bytes / self.seconds if self.seconds else float("inf")
        self.num_bytes, self.seconds = self.num_bytes / 2, self.seconds / 2
        return rate


class Ticket:
    """Copies under way."""


class Mark:
    """A point in the time of the computing."""


class CopyEngine(ABC):
    """Rows off the device, and the copies to and from them.

    Attributes:
        host_rate, device_rate: speed of copies to and from the store, and within the device.
        moved_bytes: to and from the store.
        failure: why copies no longer take place. Nobody is interrupted by it: ranks have to stay
            in step until they agree to stop.
    """

    def __init__(self) -> None:
        self.host_rate = Rate()
        self.device_rate = Rate()
        self.moved_bytes = 0
        self.failure: ServiceError | None = None

    @abstractmethod
    def start(self) -> Self:
        """Get room for the rows and begin; returns itself, its rates measured."""

    @abstractmethod
    def submit(self, copies: Sequence[Copy]) -> Ticket:
        """Begin copies, after those submitted before and what the computing has begun so far."""

    @abstractmethod
    def wait(self, ticket: Ticket) -> None:
        """Let the computing go on only when the copies are done, or will never be."""

    @abstractmethod
    def mark(self) -> Mark:
        """The computing as it has got now."""

    @abstractmethod
    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds of computing between two marks."""

    @property
    @abstractmethod
    def stalled_s(self) -> float:
        """Seconds that the computing spent in ``wait``."""

    @abstractmethod
    def close(self) -> None:
        """Wait for all copies and give the store back. Idempotent."""


def probe(engine: CopyEngine, shape: PromptShape) -> None:
    """Copy some rows each way, so that both rates of a fresh engine are known."""
    rows = max(1, min(shape.num_tokens, _PROBE_BYTES // shape.row_bytes))
    buffer = shape.empty(rows).zero_()
    other = shape.empty(rows)
    for _ in range(2):  # the first touch of memory says little
        engine.host_rate = Rate()
        engine.device_rate = Rate()
        for backing in (HostRows(0, 0, rows), other):
            rate = engine.device_rate if backing is other else engine.host_rate
            for to_device in (False, True):
                copy = Copy(buffer, backing, to_device)
                start = engine.mark()
                engine.wait(engine.submit([copy]))
                rate.add(copy.num_bytes, engine.seconds(start, engine.mark()))
    engine.moved_bytes = 0
