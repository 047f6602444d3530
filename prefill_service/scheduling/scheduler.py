"""Jobs from their creation to their end: queued, computed on some of the ranks, resident, gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from prefill_service.config import EngineConfig, resolve_kv_pool_bytes
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import new_id
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.dispatcher import JobDispatcher
from prefill_service.scheduling.exchange_planner import ExchangePlanner
from prefill_service.scheduling.job import Job, JobRecord, JobState, PrefillSpec
from prefill_service.scheduling.job_registry import JobRegistry
from prefill_service.scheduling.job_store import JobStore
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.placement import Placer, assumed_seconds
from prefill_service.scheduling.prefix_cache import PrefixCache
from prefill_service.scheduling.retry_policy import MAX_ATTEMPTS, RetryPolicy
from prefill_service.scheduling.runner import PrefillRunner

if TYPE_CHECKING:
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.video.store import VideoStore

logger = logging.getLogger(__name__)


class Scheduler:
    """Owns the jobs that are queued, running or resident.

    Args:
        engine_id: uuid of this service run, part of every manifest.
        config: size of the pool, time to live of leases, length of the queue.
        metrics: told of jobs, and reads their numbers here.
        exchanges: see ``PrefillRunner``.
    """

    def __init__(
        self,
        store: JobStore,
        videos: VideoStore,
        planning: Admission,
        group: PrefillExecutor,
        engine_id: str,
        config: EngineConfig,
        metrics: Metrics,
        exchanges: ExchangePlanner | None = None,
    ) -> None:
        self._store = store
        self._videos = videos
        self._planning = planning
        self._group = group
        self._max_queued = config.max_queued_jobs
        placer = Placer(
            group.teams, group.chunk_tokens, group, overtaking=config.elastic,
            seconds=assumed_seconds if exchanges is None else exchanges.seconds,
        )  # fmt: skip
        self._queue = JobDispatcher(placer, self._prefill, self._settle)
        self.jobs = JobRegistry(store, metrics, self._queue.ahead)
        self.prefixes = PrefixCache(
            group, resolve_kv_pool_bytes(config), config.lease_ttl_s, self.jobs.evicted
        )
        self._runner = PrefillRunner(
            group, self.prefixes, engine_id, planning, metrics, self.jobs.traces, exchanges
        )
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        metrics.watch(
            store.count_by_state, lambda: len(self._queue), lambda: self.prefixes.used_bytes
        )

    # ---- life ---------------------------------------------------------------------------

    def recover(self) -> None:
        """Take over the queue of an earlier run; comes before any other call."""
        for record in self._store.recover(MAX_ATTEMPTS):
            logger.info("resuming %s, attempts so far: %d", record.job_id, record.attempts)
            self._enqueue(Job(record))

    def start(self) -> None:
        """Begin to work. Not before the group has started once: a service that cannot start
        must not fail the jobs it found."""
        self._group.on_lost = self._group_lost
        self._tasks = [
            asyncio.create_task(self._queue.run(), name="scheduler"),
            asyncio.create_task(self.prefixes.keep_alive(), name="lease-renewal"),
        ]

    def drain(self) -> None:
        """Take no new jobs and end the watches; what calls wait for goes on."""
        self._draining = True
        for job in self.jobs.all_in_hand():
            job.touch()

    async def stop(self) -> None:
        """Stop the ranks' work. Jobs that clients created stay queued for the next start."""
        self.drain()
        for task in self._tasks:
            task.cancel()
            await asyncio.wait({task})
        for job in self._queue.waiting:
            self._queue.remove(job)
            if not job.record.explicit:
                self.jobs.end(job, JobState.CANCELLED, _shutting_down())

    # ---- for the API --------------------------------------------------------------------

    async def create(self, spec: PrefillSpec, request_id: str = "") -> JobRecord:
        """Queue a prefill, or return the job that has or makes the same prefix.

        Raises:
            ServiceError: whatever ``Admission.plan`` raises; QUEUE_FULL; SHUTTING_DOWN;
                INVALID_REQUEST if ``request_id`` was used with another spec.
        """
        if request_id:
            known = self._store.find_request(request_id, spec)
            if known is not None:
                return self.jobs.get(known)
        plan = await self._planning.plan(spec)
        if request_id:  # the same request may have come twice while this one was planned
            known = self._store.find_request(request_id, spec)
            if known is not None:
                return self.jobs.get(known)
        job = self._join(spec, plan, explicit=True)
        if request_id:
            self._store.remember_request(request_id, spec, job.record.job_id)
        return self.jobs.get(job.record.job_id)

    async def cancel(self, job_id: str) -> JobRecord:
        """Stop a job and wait until the ranks have; an ended one is returned as it is.

        Raises:
            ServiceError: UNKNOWN_JOB.
        """
        job = self.jobs.in_hand(job_id)
        if job is not None and job.record.active:
            self._cancel(job, ServiceError(Reason.CANCELLED, "a client cancelled the job"))
            await job.ended()
        return self.jobs.get(job_id)

    async def watch(self, job_id: str) -> AsyncGenerator[JobRecord]:
        """The job now and at each change, until it has ended.

        Raises:
            ServiceError: UNKNOWN_JOB; SHUTTING_DOWN when the service drains.
        """
        job = self.jobs.in_hand(job_id)
        if job is None:
            yield self.jobs.get(job_id)
            return
        while True:
            version, snapshot = job.version, self.jobs.snapshot(job)
            yield snapshot
            if not snapshot.active:
                return
            await job.changed(version)
            if self._draining and job.record.active:
                raise _shutting_down()

    # ---- for answers --------------------------------------------------------------------

    @asynccontextmanager
    async def interest(self, spec: PrefillSpec, plan: PrefixPlan) -> AsyncIterator[Job]:
        """The job that has or makes the prefix, for a call that waits for it.

        When the last such call leaves a job that nobody created explicitly, it is cancelled.

        Raises:
            ServiceError: QUEUE_FULL, SHUTTING_DOWN.
        """
        job = self._join(spec, plan, explicit=False)
        job.waiters += 1
        try:
            yield job
        finally:
            job.waiters -= 1
            if not job.waiters and not job.record.explicit and job.record.active:
                self._cancel(
                    job, ServiceError(Reason.CANCELLED, "all calls that waited for the job ended")
                )

    # ---- the queue ----------------------------------------------------------------------

    def _join(self, spec: PrefillSpec, plan: PrefixPlan, explicit: bool) -> Job:
        job = self.jobs.of_prefix(plan.prefix_id)
        if job is not None and not (job.record.active and job.cancelled_by):
            if explicit and not job.record.explicit:
                self._store.update(job.update(explicit=True))
            return job
        if self._draining:
            raise _shutting_down()
        if len(self._queue) >= self._max_queued:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{len(self._queue)} jobs are waiting; the limit is {self._max_queued}",
                queued=len(self._queue), limit=self._max_queued,
            )  # fmt: skip
        job = Job(
            JobRecord(
                new_id("job"), spec, plan.prefix_id, plan.num_tokens, explicit,
                create_time=time.time(),
            )
        )  # fmt: skip
        self._store.insert(job.record)
        self._enqueue(job)
        logger.info("queued %s: %d tokens of %s", job.record.job_id, plan.num_tokens, spec.video_id)
        return job

    def _enqueue(self, job: Job) -> None:
        self.jobs.traces.begin(job.record.job_id)
        self.jobs.add(job)
        self._queue.append(job)

    def _cancel(self, job: Job, cause: ServiceError) -> None:
        if job.cancelled_by is not None:
            return  # its ranks are stopping: another CancelledError would only hurry what waits
        job.cancelled_by = cause
        if job.task is not None:
            job.task.cancel()
        elif self._queue.remove(job):
            self.jobs.end(job, JobState.CANCELLED, cause)

    def _settle(self, job: Job, task: asyncio.Task[None]) -> None:
        """Give a job whose task has ended its state."""
        if not job.record.active:
            return
        error = None if task.cancelled() else task.exception()
        if job.cancelled_by is not None:
            self.jobs.end(job, JobState.CANCELLED, job.cancelled_by)
        elif isinstance(error, ServiceError):
            self.jobs.end(job, JobState.FAILED, error)
        elif error is not None:
            logger.error("%s failed unexpectedly", job.record.job_id, exc_info=error)
            self.jobs.end(job, JobState.FAILED, ServiceError(Reason.INTERNAL, f"{error!r}"))
        elif job.record.explicit:  # the service stops: this start does not count
            started = job.record.state is JobState.RUNNING
            self.jobs.save(
                job.update(state=JobState.QUEUED, attempts=job.record.attempts - started)
            )
        else:
            self.jobs.end(job, JobState.CANCELLED, _shutting_down())

    async def _prefill(self, job: Job, team: Subgroup, over: str) -> None:
        """Run a job to its success, on a second group if the first one dies.

        Args:
            team, over: see ``PrefillRunner.run``.
        """
        spec, job_id = job.record.spec, job.record.job_id
        self.jobs.traces.queued(job_id)
        async with self._videos.hold_video(spec.video_id) as video:
            with self.jobs.traces.span(job_id, "plan"):
                plan = await self._planning.plan_held(spec, video)
            self.jobs.rename(job, plan)
            attempts = RetryPolicy(team)
            while True:
                starts = job.record.attempts
                try:
                    result, report = await self._runner.run(
                        job.record.job_id, plan, spec, video, team, over,
                        lambda: self._started(job), job.advance,
                    )  # fmt: skip
                    if report is not None:
                        self.jobs.keep_report(job, report)
                    self.jobs.end(job, JobState.SUCCEEDED, result=result)
                    return
                except ServiceError as error:
                    started = job.record.attempts > starts  # else the group cannot even start
                    again = started and attempts.another(error, job.record.attempts)
                    if not again or job.cancelled_by:
                        raise
                    logger.warning("%s: %s; trying again", job.record.job_id, error)
                    self.jobs.save(job.update(state=JobState.QUEUED))

    def _started(self, job: Job) -> None:
        attempts = job.record.attempts + 1
        self.jobs.save(
            job.update(state=JobState.RUNNING, attempts=attempts, start_time=time.time())
        )

    def _group_lost(self, generation: int) -> None:
        logger.warning("generation %d of the rank group is gone, with its prefixes", generation)
        self.prefixes.lose_generation(generation)


def _shutting_down() -> ServiceError:
    return ServiceError(Reason.SHUTTING_DOWN, "the service is shutting down; ask again later")
