"""The jobs that wait and those that run: started as ranks become free, stopped, counted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from prefill_service.scheduling.job import Job
from prefill_service.scheduling.placement import Active, Placement, Placer, Waiting

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Running:
    """A job that has ranks, and the tokens of those that have preempted it."""

    job: Job
    placement: Placement
    preempted_tokens: int = 0


class JobDispatcher:
    """Runs jobs where ``Placer`` puts them.

    Args:
        placer: decides which job starts where.
        run_job: computes a job where it was placed.
        settle: called when that has ended, however it did.
    """

    def __init__(
        self,
        placer: Placer,
        run_job: Callable[[Job, Placement], Coroutine[None, None, None]],
        settle: Callable[[Job, asyncio.Task[None]], None],
    ) -> None:
        self._placer = placer
        self._run_job = run_job
        self._settle = settle
        self._waiting: list[Job] = []
        self._bypassed: dict[str, int] = {}
        self._running: dict[str, _Running] = {}
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def waiting(self) -> tuple[Job, ...]:
        """The jobs that have not started, in the order of their arrival."""
        return tuple(self._waiting)

    def enqueue(self, job: Job) -> None:
        """Let a job wait for ranks."""
        self._waiting.append(job)
        self._wake.set()

    def withdraw(self, job: Job) -> bool:
        """Take a job out of the queue; False if it has started or is not there."""
        if job not in self._waiting:
            return False
        self._dequeue(job)
        self._wake.set()
        return True

    def count_ahead(self, job: Job) -> int:
        """How many jobs are before a waiting one, running ones included."""
        if job not in self._waiting:
            return 0
        return self._waiting.index(job) + len(self._running)

    async def dispatch(self) -> None:
        """Start jobs for as long as this coroutine runs; then stop those that run."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                self._start_jobs()
        finally:
            running = [entry.job.task for entry in self._running.values()]
            tasks = [task for task in running if task is not None]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    def _start_jobs(self) -> None:
        jobs = {job.record.job_id: job for job in self._waiting}
        waiting = [
            Waiting(
                job_id=job_id,
                tokens=job.tokens,
                all_ranks=job.needs_all_ranks,
                subgroup=job.needed_subgroup,
                bypassed=self._bypassed.get(job_id, 0),
            )
            for job_id, job in jobs.items()
        ]
        active = [_active(running) for running in self._running.values()]
        for placement in self._placer.place_jobs(waiting, active):
            self._start(jobs[placement.job_id], placement)

    def _start(self, job: Job, placement: Placement) -> None:
        for earlier in self._waiting[: self._waiting.index(job)]:
            job_id = earlier.record.job_id
            self._bypassed[job_id] = self._bypassed.get(job_id, 0) + 1
        preempting = ""
        if placement.preempts:
            self._running[placement.preempts].preempted_tokens += job.tokens
            preempting = f", preempting {placement.preempts}"
        logger.info("%s starts on %s%s", job.record.job_id, placement.subgroup, preempting)
        job.subgroup = placement.subgroup
        self._running[job.record.job_id] = _Running(job, placement)
        job.task = asyncio.create_task(self._run_job(job, placement), name=job.record.job_id)
        job.task.add_done_callback(lambda task: self._finish(job, task))
        self._dequeue(job)

    def _dequeue(self, job: Job) -> None:
        self._waiting.remove(job)
        self._bypassed.pop(job.record.job_id, None)
        for other in self._waiting:
            other.notify()

    def _finish(self, job: Job, task: asyncio.Task[None]) -> None:
        del self._running[job.record.job_id]
        job.task = None
        self._settle(job, task)
        for other in self._waiting:
            other.notify()
        self._wake.set()


def _active(running: _Running) -> Active:
    job = running.job
    return Active(
        job_id=job.record.job_id,
        tokens=job.tokens,
        tokens_left=job.tokens_left,
        subgroup=running.placement.subgroup,
        preemptible=not job.needs_all_ranks and job.cancelled_by is None,
        preempted_tokens=running.preempted_tokens,
        preempts=running.placement.preempts,
    )
