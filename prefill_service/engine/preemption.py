"""Which task has which ranks when, and when one is paused for another.

The workers do what they are sent and cannot know whom they keep waiting; this module knows. A rank
has at most one task that is not paused. A task starts when all ranks of its subgroup are free, or
when the only other task on them is paused. A rank that waits in a collective therefore waits for
ranks that are in the same task, and no two tasks can wait for each other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto

from prefill_service.parallel.subgroups import Subgroup


class AllocationState(Enum):
    """How far a task that has its ranks is."""

    GRANTED = auto()
    """The ranks have not been sent the task yet, so that they could not pause it."""
    RUNNING = auto()
    PAUSING = auto()
    """The ranks have been asked to pause the task; it may end before they do."""
    PAUSED = auto()


@dataclass(slots=True, eq=False)
class Allocation:
    """One task's right to the ranks of its subgroup.

    Attributes:
        tokens: of the prefix that the task computes.
        preempts: id of the task to pause for this one, where that spares it waiting.
        preemptible: whether this task may itself be paused.
        preempted: the paused task whose ranks this one has.
        paused_s: seconds for which this task was paused.
    """

    job_id: str
    subgroup: Subgroup
    tokens: int = 0
    preempts: str = ""
    preemptible: bool = True
    preempted: Allocation | None = None
    state: AllocationState = AllocationState.GRANTED
    paused_s: float = 0.0
    _confirmed: set[int] = field(default_factory=set)
    _paused_at: float = 0.0
    _granted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def paused(self) -> bool:
        """Whether all of its ranks are free for others."""
        return self.state is AllocationState.PAUSED


class RankAllocator:
    """Allocates ranks: first come, first served among tasks that want the same ones.

    A task that preempts another does not queue behind those that wait for the other's end. A task
    that runs in another's pause is not paused itself.

    Args:
        pause: asks a task's ranks to pause it. Each of them confirms (``confirm_paused``), unless
            the task ends first.
        resume: lets a paused task's ranks go on.
        fit: whether the ranks have memory for a preempted task and the one that preempts it.
    """

    def __init__(
        self,
        pause: Callable[[Allocation], None],
        resume: Callable[[Allocation], None],
        fit: Callable[[Allocation, Allocation], bool] = lambda preempted, preempting: True,
    ) -> None:
        self._pause = pause
        self._resume = resume
        self._fit = fit
        self._allocated: list[Allocation] = []
        self._waiting: list[Allocation] = []

    @asynccontextmanager
    async def acquire(
        self,
        job_id: str,
        subgroup: Subgroup,
        *,
        tokens: int = 0,
        preempts: str = "",
        preemptible: bool = True,
    ) -> AsyncIterator[Allocation]:
        """Wait for the subgroup's ranks; they are freed with the context.

        The caller sends the task to the ranks and then calls ``mark_started``.
        """
        allocation = Allocation(
            job_id, subgroup, tokens=tokens, preempts=preempts, preemptible=preemptible
        )
        self._waiting.append(allocation)
        try:
            self._advance()
            await allocation._granted.wait()
            yield allocation
        finally:
            queue = self._allocated if allocation in self._allocated else self._waiting
            queue.remove(allocation)
            self._advance()

    def mark_started(self, allocation: Allocation) -> None:
        """Note that the ranks were sent the task: from now on they can be asked to pause it."""
        allocation.state = AllocationState.RUNNING
        self._advance()

    def confirm_paused(self, job_id: str, rank: int) -> None:
        """Note that a rank has paused the task."""
        for allocation in self._allocated:
            if allocation.job_id == job_id and allocation.state is AllocationState.PAUSING:
                allocation._confirmed.add(rank)
                if len(allocation._confirmed) == allocation.subgroup.size:
                    allocation.state = AllocationState.PAUSED
                    allocation._paused_at = time.monotonic()
                    allocation._confirmed.clear()
                    self._advance()

    def mark_stopping(self, allocation: Allocation) -> None:
        """Note that the task is being stopped: nothing more preempts it, so it ends soon."""
        allocation.preemptible = False
        self._advance()

    def _advance(self) -> None:
        """Start what can start, pause what has to be paused, resume what nothing preempts."""
        blocked: list[Allocation] = []
        for allocation in list(self._waiting):
            preempted = self._find_preempted(allocation)
            if preempted is not None and preempted.state is AllocationState.RUNNING:
                preempted.state = AllocationState.PAUSING
                self._pause(preempted)
            if self._can_start(allocation, preempted, blocked):
                self._waiting.remove(allocation)
                self._allocated.append(allocation)
                allocation.preempted = preempted
                allocation._granted.set()
            else:
                blocked.append(allocation)
        for allocation in self._allocated:
            if allocation.paused and not self._is_preempted(allocation):
                allocation.state = AllocationState.RUNNING
                allocation.paused_s += time.monotonic() - allocation._paused_at
                self._resume(allocation)

    def _is_preempted(self, allocation: Allocation) -> bool:
        return any(other.preempted is allocation for other in self._allocated)

    def _find_preempted(self, allocation: Allocation) -> Allocation | None:
        """The task to pause for this one, if it is there and can be paused."""
        for other in self._allocated:
            if (
                other.job_id == allocation.preempts
                and other.preemptible
                and other.preempted is None
            ):
                suits = other.subgroup.contains(allocation.subgroup)
                return other if suits and self._fit(other, allocation) else None
        return None

    def _can_start(
        self, allocation: Allocation, preempted: Allocation | None, blocked: list[Allocation]
    ) -> bool:
        subgroup = allocation.subgroup
        busy = [other for other in self._allocated if other.subgroup.overlaps(subgroup)]
        if preempted is not None:
            return preempted.paused and busy == [preempted]
        return not busy and not any(other.subgroup.overlaps(subgroup) for other in blocked)
