"""How the ranks that compute a task agree to go on, to pause or to stop.

At a synchronisation point every rank contributes one integer and all learn the largest. That makes
each rank wait for the slowest. Once per layer, the waits would add up to the sum of every layer's
slowest rank; ranks that may drift apart for a while even that out. They therefore agree by the
clock, but count in layers, since only a count is the same on all of them (``SyncInterval``).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NoReturn

from prefill_service.errors import ServiceError
from prefill_service.parallel.process_group import SPGroup

INTERVAL_MS = 250
"""Time between two agreements, rounded up to a layer: how late a cancelled job stops."""

MAX_LAYER_MS = (1 << 20) - 1


class CollectiveStatus(IntEnum):
    """How a task stands on a rank. The largest value of all ranks applies to all of them."""

    RUNNING = 0
    CANCELLED = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class TaskControl:
    """What the front end wants of a task while it runs.

    Attributes:
        cancelled: set when the task is to stop.
        pause: set when the task is to pause once, at its next chunk.
        yield_ranks: pauses the task and returns when it may go on.
    """

    cancelled: threading.Event
    pause: threading.Event
    yield_ranks: Callable[[], None]


class TaskAborted(Exception):
    """All ranks have agreed to stop a task; ``error`` is set on the rank that caused it."""

    def __init__(self, status: CollectiveStatus, error: ServiceError | None) -> None:
        super().__init__(status.name)
        self.status = status
        self.error = error


@dataclass(slots=True)
class SyncInterval:
    """How many layers lie between two agreements, on one rank of those that compute a task.

    All ranks count the same layers and learn the same times, so that they agree at the same layers.

    Attributes:
        layers: layers between two agreements.
    """

    layers: int = 1
    _layers_since: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def count_layer(self) -> bool:
        """Count a layer that is about to be computed; whether an agreement is due before it."""
        self._layers_since += 1
        return self._layers_since >= self.layers

    @property
    def layer_ms(self) -> int:
        """Time per layer since the last agreement, rounded up; 0 if no layer was counted."""
        elapsed = 1000 * (time.perf_counter() - self._start)
        return math.ceil(elapsed / self._layers_since) if self._layers_since else 0

    def restart(self, layer_ms: int) -> None:
        """Start the next interval, given the slowest rank's time per layer, or 0 if unknown."""
        if layer_ms:
            self.layers = max(1, INTERVAL_MS // layer_ms)
        self._layers_since = 0
        self._start = time.perf_counter()


def pack_status(status: CollectiveStatus, can_pause: bool, layer_ms: int) -> int:
    """One integer whose maximum over ranks says what all of them need to know.

    The status is the most significant part: the gravest one wins. Then comes whether a rank can not
    pause: one that cannot wins. Then the time per layer: the longest among those wins.
    """
    return (2 * status + (not can_pause)) * (MAX_LAYER_MS + 1) + min(layer_ms, MAX_LAYER_MS)


def unpack_status(packed: int) -> tuple[CollectiveStatus, bool, int]:
    """The gravest status, whether all ranks can pause, and the longest time per layer."""
    leading, layer_ms = divmod(packed, MAX_LAYER_MS + 1)
    status, cannot_pause = divmod(leading, 2)
    return CollectiveStatus(status), not cannot_pause, layer_ms


def sync_point(
    group: SPGroup,
    control: TaskControl,
    *,
    interval: SyncInterval | None = None,
    error: ServiceError | None = None,
) -> None:
    """Let all ranks of the group go on, or raise on all of them.

    Args:
        interval: restarted with the slowest rank's time per layer.
        error: why this rank cannot go on.

    Raises:
        TaskAborted: a rank has an error, or the task is cancelled.
    """
    _agree(group, control, interval=interval, error=error, can_pause=False)


def preemption_point(
    group: SPGroup,
    control: TaskControl,
    *,
    interval: SyncInterval,
    error: ServiceError | None = None,
) -> bool:
    """A ``sync_point`` at which the task pauses if all of its ranks have been asked to.

    No collective is under way then, and none starts before all ranks go on, so that a pause may
    last arbitrarily long.

    Returns:
        Whether the task was paused.
    """
    can_pause = control.pause.is_set()
    paused = _agree(group, control, interval=interval, error=error, can_pause=can_pause)
    if paused:
        control.pause.clear()
        control.yield_ranks()
    return paused


def fail_together(group: SPGroup, control: TaskControl, error: ServiceError) -> NoReturn:
    """Stop the task on all ranks, at whichever synchronisation point the others reach next."""
    sync_point(group, control, error=error)
    raise AssertionError("a synchronisation point with an error raises on every rank")


def _agree(
    group: SPGroup,
    control: TaskControl,
    *,
    interval: SyncInterval | None,
    error: ServiceError | None,
    can_pause: bool,
) -> bool:
    """Whether all ranks can pause.

    Raises:
        TaskAborted: the gravest status of all ranks is not ``RUNNING``.
    """
    status = CollectiveStatus.RUNNING
    if error is not None:
        status = CollectiveStatus.FAILED
    elif control.cancelled.is_set():
        status = CollectiveStatus.CANCELLED
    layer_ms = interval.layer_ms if interval is not None else 0
    packed = group.all_reduce_max(pack_status(status, can_pause, layer_ms))
    status, all_can_pause, layer_ms = unpack_status(packed)
    if status is not CollectiveStatus.RUNNING:
        raise TaskAborted(status, error)
    if interval is not None:
        interval.restart(layer_ms)
    return all_can_pause
