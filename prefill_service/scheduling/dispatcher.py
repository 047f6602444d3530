"""The jobs that wait and those at work: begun as ranks become free, stopped, counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.job import Job
from prefill_service.scheduling.placement import Active, Placement, Placer, Waiting

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Working:
    """A job with its ranks."""

    job: Job
    placement: Placement
    overtaken: int = 0


class JobDispatcher:
    """Runs jobs where ``Placer`` puts them.

    Args:
        placer: decides.
        work: computes a job on its team, pausing another one for it if told so.
        settle: called when that has ended, however.
    """

    def __init__(
        self,
        placer: Placer,
        work: Callable[[Job, Subgroup, str], Coroutine[None, None, None]],
        settle: Callable[[Job, asyncio.Task[None]], None],
    ) -> None:
        self._placer, self._work, self._settle = placer, work, settle
        self._waiting: list[Job] = []
        self._passed: dict[str, int] = {}
        self._working: dict[str, _Working] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Job, ...]:
        """Those that have not begun, in the order in which they came."""
        return tuple(self._waiting)

    def append(self, job: Job) -> None:
        """Let a job wait for ranks."""
        self._waiting.append(job)
        self._wake.set()

    def remove(self, job: Job) -> bool:
        """Take a job out; False if it has begun, or is not here."""
        if job not in self._waiting:
            return False
        self._leave(job)
        self._wake.set()
        return True

    def ahead(self, job: Job) -> int:
        """Jobs before a waiting one, those at work included."""
        if job not in self._waiting:
            return 0
        return self._waiting.index(job) + len(self._working)

    async def run(self) -> None:
        """Begin jobs for as long as this coroutine runs; then stop those at work."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._begin()
        finally:
            tasks = [task for w in self._working.values() if (task := w.job.task) is not None]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def _begin(self) -> None:
        jobs = {job.record.job_id: job for job in self._waiting}
        waiting = [
            Waiting(name, job.record.prefix_tokens, job.whole_group, self._passed.get(name, 0))
            for name, job in jobs.items()
        ]
        active = [_active(working) for working in self._working.values()]
        for placement in self._placer.place(waiting, active):
            self._start(jobs[placement.job_id], placement)

    def _start(self, job: Job, placement: Placement) -> None:
        for earlier in self._waiting[: self._waiting.index(job)]:
            name = earlier.record.job_id
            self._passed[name] = self._passed.get(name, 0) + 1
        inside = ""
        if placement.over:
            self._working[placement.over].overtaken += job.record.prefix_tokens
            inside = f", overtaking {placement.over}"
        logger.info("%s begins on %s%s", job.record.job_id, placement.team, inside)
        self._working[job.record.job_id] = _Working(job, placement)
        work = self._work(job, placement.team, placement.over)
        job.task = asyncio.create_task(work, name=job.record.job_id)
        job.task.add_done_callback(lambda task: self._ended(job, task))
        self._leave(job)

    def _leave(self, job: Job) -> None:
        self._waiting.remove(job)
        self._passed.pop(job.record.job_id, None)
        for other in self._waiting:
            other.touch()

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        del self._working[job.record.job_id]
        job.task = None
        self._settle(job, task)
        for other in self._waiting:
            other.touch()
        self._wake.set()


def _active(working: _Working) -> Active:
    job, placement = working.job, working.placement
    return Active(
        job.record.job_id,
        job.record.prefix_tokens,
        job.tokens_left,
        placement.team,
        pausable=not job.whole_group and job.cancelled_by is None,
        overtaken=working.overtaken,
        inside=placement.over,
    )
