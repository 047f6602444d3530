"""Which task may use which ranks when, and when one is paused for another.

The ranks do as they are told and cannot know whom they keep waiting; here it is known. A rank has
at most one task that goes on. A task begins when all of its team's ranks are free, or when the only
other task on them is paused, so that whoever waits in a collective waits for ranks that are in the
same task, and nothing can be waited for in a circle.
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
    """Of a task that has its ranks."""

    GRANTED = auto()
    """They have not been told of it, and would not know what to pause."""
    RUNNING = auto()
    PAUSING = auto()
    """Told to pause; it may end without."""
    PAUSED = auto()


@dataclass(slots=True, eq=False)
class Allocation:
    """One task's right to its team's ranks.

    Attributes:
        tokens: of its prefix.
        over: id of the task that is to be paused for this one, if it has to wait for no other.
        pausable: whether this one may be paused.
        inside: the paused task whose ranks it has.
        paused_s: seconds that it was paused.
    """

    job_id: str
    team: Subgroup
    tokens: int = 0
    over: str = ""
    pausable: bool = True
    inside: Allocation | None = None
    state: AllocationState = AllocationState.GRANTED
    paused_s: float = 0.0
    _said: set[int] = field(default_factory=set)
    _since: float = 0.0
    _granted: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def paused(self) -> bool:
        """Its ranks are, all of them, free for others."""
        return self.state is AllocationState.PAUSED


class RankAllocator:
    """Grants turns: first come, first served among tasks that want the same ranks.

    A task that is to run inside another's pause does not wait for those that wait for the other's
    end. One that runs so is not paused itself.

    Args:
        pause: tells a task's ranks to pause; each of them says so (``said_paused``), unless the
            task ends first.
        resume: tells a paused task's ranks to go on.
        fit: whether ranks have room for a paused task and another one inside.
    """

    def __init__(
        self,
        pause: Callable[[Allocation], None],
        resume: Callable[[Allocation], None],
        fit: Callable[[Allocation, Allocation], bool] = lambda paused, inside: True,
    ) -> None:
        self._pause, self._resume, self._fit = pause, resume, fit
        self._running: list[Allocation] = []
        self._waiting: list[Allocation] = []

    @asynccontextmanager
    async def take(
        self, job_id: str, team: Subgroup, tokens: int = 0, over: str = "", pausable: bool = True
    ) -> AsyncIterator[Allocation]:
        """Wait for a turn; it ends with the context. ``begun`` follows once the ranks know."""
        turn = Allocation(job_id, team, tokens, over, pausable)
        self._waiting.append(turn)
        try:
            self._advance()
            await turn._granted.wait()
            yield turn
        finally:
            (self._running if turn in self._running else self._waiting).remove(turn)
            self._advance()

    def begun(self, turn: Allocation) -> None:
        """The task's ranks have been told to run it: from now on they can be told to pause it."""
        turn.state = AllocationState.RUNNING
        self._advance()

    def said_paused(self, job_id: str, rank: int) -> None:
        """A rank has paused the task."""
        for turn in self._running:
            if turn.job_id == job_id and turn.state is AllocationState.PAUSING:
                turn._said.add(rank)
                if len(turn._said) == turn.team.size:
                    turn.state, turn._since = AllocationState.PAUSED, time.monotonic()
                    turn._said.clear()
                    self._advance()

    def ending(self, turn: Allocation) -> None:
        """The task is being stopped: nothing more runs inside it, so that it soon goes on to."""
        turn.pausable = False
        self._advance()

    def _advance(self) -> None:
        """Start what can start, pause what has to be, resume what need not be paused any more."""
        before: list[Allocation] = []
        for turn in list(self._waiting):
            outer = self._outer(turn)
            if outer is not None and outer.state is AllocationState.RUNNING:
                outer.state = AllocationState.PAUSING
                self._pause(outer)
            if self._free(turn, outer, before):
                self._waiting.remove(turn)
                self._running.append(turn)
                turn.inside = outer
                turn._granted.set()
            else:
                before.append(turn)
        for turn in self._running:
            if turn.paused and not any(other.inside is turn for other in self._running):
                turn.state = AllocationState.RUNNING
                turn.paused_s += time.monotonic() - turn._since
                self._resume(turn)

    def _outer(self, turn: Allocation) -> Allocation | None:
        """The task to pause for this one, if there is one to be paused."""
        for other in self._running:
            if other.job_id == turn.over and other.pausable and other.inside is None:
                suits = other.team.contains(turn.team) and self._fit(other, turn)
                return other if suits else None
        return None

    def _free(self, turn: Allocation, outer: Allocation | None, before: list[Allocation]) -> bool:
        busy = [other for other in self._running if other.team.overlaps(turn.team)]
        if outer is not None:
            return outer.paused and busy == [outer]
        return not busy and not any(other.team.overlaps(turn.team) for other in before)
