"""Jobs from their creation to their end: queued, computed on some of the ranks, resident, gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from prefill_service.config import EngineConfig, resolve_kv_pool_bytes
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import new_id
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.dispatcher import JobDispatcher
from prefill_service.scheduling.exchange_chooser import ExchangeChooser
from prefill_service.scheduling.job import Extension, Job, JobRecord, JobState, PrefillSpec
from prefill_service.scheduling.job_registry import JobRegistry
from prefill_service.scheduling.job_store import JobStore
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.placement import Placement, Placer, assumed_seconds
from prefill_service.scheduling.prefix_cache import PrefixCache
from prefill_service.scheduling.runner import (
    MAX_ATTEMPTS,
    PrefillAttempt,
    PrefillRunner,
    RetryPolicy,
)
from prefill_service.scheduling.traces import TraceStore

if TYPE_CHECKING:
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.video.store import VideoStore

logger = logging.getLogger(__name__)


class Scheduler:
    """The jobs that are queued, running or resident, and all that is done with them.

    Args:
        config: size of the pool, time to live of leases, length of the queue.
        metrics: counts jobs, and reads their numbers here.
        exchanges: chooses each prefix's exchange; without it, it is the configured one.

    Attributes:
        jobs: the live jobs and all records.
        prefixes: the prefixes that the ranks have.
        traces: of the latest jobs.
        text_from_tokens: the longest question that the ranks leave to vLLM; 0: they leave all.
    """

    def __init__(
        self,
        store: JobStore,
        videos: VideoStore,
        admission: Admission,
        executor: PrefillExecutor,
        *,
        config: EngineConfig,
        metrics: Metrics,
        exchanges: ExchangeChooser | None = None,
    ) -> None:
        self._store = store
        self._videos = videos
        self._admission = admission
        self._executor = executor
        self._max_queued = config.max_queued_jobs
        self.text_from_tokens = config.text_from_tokens
        placer = Placer(
            executor.subgroups,
            executor.chunk_tokens,
            executor,
            preemption=config.elastic,
            seconds=assumed_seconds if exchanges is None else exchanges.predict_seconds,
        )
        self._queue = JobDispatcher(placer, self._run_job, self._settle)
        self.traces = TraceStore()
        self.jobs = JobRegistry(store, metrics, self.traces, self._queue.count_ahead)
        self.prefixes = PrefixCache(
            executor, resolve_kv_pool_bytes(config), config.lease_ttl_s, self.jobs.end_evicted
        )
        self._runner = PrefillRunner(
            executor,
            self.prefixes,
            admission,
            metrics=metrics,
            traces=self.traces,
            exchanges=exchanges,
        )
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        metrics.watch_live(
            store.count_by_state, lambda: len(self._queue), lambda: self.prefixes.used_bytes
        )

    # ---- life ---------------------------------------------------------------------------

    def recover(self) -> None:
        """Queue the jobs of an earlier run; comes before any other call."""
        for record in self._store.recover(MAX_ATTEMPTS):
            logger.info("resuming %s, attempts so far: %d", record.job_id, record.attempts)
            self._enqueue(Job(record))

    def start(self) -> None:
        """Start to run jobs.

        The workers must have started once before: a service that cannot start must not fail the
        jobs that it has found.
        """
        self._executor.supervisor.add_loss_listener(self._forget_epoch)
        self._tasks = [
            asyncio.create_task(self._queue.dispatch(), name="scheduler"),
            asyncio.create_task(self.prefixes.renew_leases(), name="lease-renewal"),
        ]

    def drain(self) -> None:
        """Take no new jobs and end the watches; what calls wait for goes on."""
        self._draining = True
        for job in self.jobs.live:
            job.notify()

    async def stop(self) -> None:
        """Stop the ranks' work. Jobs that clients created stay queued for the next start."""
        self.drain()
        for task in self._tasks:
            task.cancel()
            await asyncio.wait({task})
        for job in self._queue.waiting:
            self._queue.withdraw(job)
            if not job.record.explicit:
                self.jobs.end_job(job, JobState.CANCELLED, _shutting_down())
        self.jobs.write_unsaved()

    # ---- for the API --------------------------------------------------------------------

    async def create_job(self, spec: PrefillSpec, request_id: str = "") -> JobRecord:
        """Queue a prefill, or return the job that has or makes the same prefix.

        Raises:
            ServiceError: whatever ``Admission.plan_prefix`` raises; QUEUE_FULL; SHUTTING_DOWN;
                INVALID_REQUEST if ``request_id`` was used with another spec.
        """
        if request_id:
            known = self._store.find_request(request_id, spec)
            if known is not None:
                return self.jobs.get_record(known)
        plan = await self._admission.plan_prefix(spec)
        if request_id:  # the same request may have come twice while this one was planned
            known = self._store.find_request(request_id, spec)
            if known is not None:
                return self.jobs.get_record(known)
        job = self._join(spec, plan, explicit=True, request_id=request_id)
        await self._store.sync()  # what a client was told stays so over a power cut
        return self.jobs.get_record(job.record.job_id)

    async def cancel_job(self, job_id: str) -> JobRecord:
        """Stop a job and wait until the ranks have; an ended one is returned as it is.

        Raises:
            ServiceError: UNKNOWN_JOB.
        """
        job = self.jobs.find_live(job_id)
        if job is not None and job.record.active:
            self._cancel(job, ServiceError(Reason.CANCELLED, "a client cancelled the job"))
            await job.wait_ended()
            await self._store.sync()
        return self.jobs.get_record(job_id)

    async def watch_job(self, job_id: str) -> AsyncGenerator[JobRecord]:
        """The job now and at each change, until it has ended.

        Raises:
            ServiceError: UNKNOWN_JOB; SHUTTING_DOWN when the service drains.
        """
        job = self.jobs.find_live(job_id)
        if job is None:
            yield self.jobs.get_record(job_id)
            return
        while True:
            version = job.version
            snapshot = self.jobs.snapshot(job)
            yield snapshot
            if not snapshot.active:
                return
            await job.wait_changed(version)
            if self._draining and job.record.active:
                raise _shutting_down()

    # ---- for answers --------------------------------------------------------------------

    @asynccontextmanager
    async def acquire(self, spec: PrefillSpec, plan: PrefixPlan) -> AsyncIterator[Job]:
        """The job that has or makes the prefix, for as long as a call needs it.

        When the last such call releases a job that nobody created explicitly, it is cancelled.

        Raises:
            ServiceError: QUEUE_FULL, SHUTTING_DOWN.
        """
        async with self._hold(self._join(spec, plan, explicit=False)) as job:
            yield job

    def find_text(self, base: Job, token_ids: np.ndarray) -> Job | None:
        """The job that has, after the prefix of ``base``, most of the text that a prompt has there.

        Args:
            token_ids: of the whole prompt.
        """
        found = [
            job
            for job in self.jobs.live
            if job.extension is not None
            and job.extension.base is base
            and job.record.state is JobState.SUCCEEDED
            and _begins_with(token_ids, job.extension.plan.token_ids)
        ]
        return max(found, key=lambda job: job.tokens, default=None)

    @asynccontextmanager
    async def acquire_text(self, plan: PrefixPlan, base: Job) -> AsyncIterator[Job]:
        """The job that has or makes a prefix extended by text, as ``acquire``.

        Args:
            plan: of the prefix with the text.
            base: the job that has the prefix, on whose ranks the text is computed.

        Raises:
            ServiceError: QUEUE_FULL, SHUTTING_DOWN.
        """
        extension = Extension(plan, base)
        job = self._join(base.record.spec, plan, explicit=False, extension=extension)
        async with self._hold(job):
            yield job

    @asynccontextmanager
    async def _hold(self, job: Job) -> AsyncIterator[Job]:
        """Note that a call needs a job; without any it ends, unless a client has created it."""
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

    def _join(
        self,
        spec: PrefillSpec,
        plan: PrefixPlan,
        *,
        explicit: bool,
        extension: Extension | None = None,
        request_id: str = "",
    ) -> Job:
        """The job that has or makes a prefix, made if there is none."""
        job = self.jobs.find_by_prefix(plan.prefix_id)
        if job is not None and not (job.record.active and job.cancelled_by):
            if explicit:
                self._store.join_record(replace(job.record, explicit=True), request_id, spec)
                job.update(explicit=True)
            return job
        if self._draining:
            raise _shutting_down()
        if len(self._queue) >= self._max_queued:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"{len(self._queue)} jobs are waiting; the limit is {self._max_queued}",
                queued=len(self._queue),
                limit=self._max_queued,
            )
        record = JobRecord(
            job_id=new_id("job"),
            spec=spec,
            prefix_id=plan.prefix_id,
            prefix_tokens=plan.num_tokens,
            explicit=explicit,
            create_time=time.time(),
        )
        job = Job(record, extension)
        self._store.insert_record(record, request_id)
        self._enqueue(job)
        logger.info("queued %s: %d tokens of %s", record.job_id, plan.num_tokens, spec.video_id)
        return job

    def _enqueue(self, job: Job) -> None:
        self.traces.begin_trace(job.record.job_id)
        self.jobs.add_job(job)
        self._queue.enqueue(job)

    def _cancel(self, job: Job, cause: ServiceError) -> None:
        if job.cancelled_by is not None:
            return  # its ranks are stopping: another CancelledError would only hurry what waits
        job.cancelled_by = cause
        if job.task is not None:
            job.task.cancel()
        elif self._queue.withdraw(job):
            self.jobs.end_job(job, JobState.CANCELLED, cause)

    def _settle(self, job: Job, task: asyncio.Task[None]) -> None:
        """Give a job whose task has ended its state."""
        if not job.record.active:
            return
        error = None if task.cancelled() else task.exception()
        if job.cancelled_by is not None:
            self.jobs.end_job(job, JobState.CANCELLED, job.cancelled_by)
        elif isinstance(error, ServiceError):
            self.jobs.end_job(job, JobState.FAILED, error)
        elif error is not None:
            logger.error("%s failed unexpectedly", job.record.job_id, exc_info=error)
            self.jobs.end_job(job, JobState.FAILED, ServiceError(Reason.INTERNAL, f"{error!r}"))
        elif job.record.explicit:  # the service stops: this start does not count
            started = job.record.state is JobState.RUNNING
            self.jobs.save(
                job.update(state=JobState.QUEUED, attempts=job.record.attempts - started)
            )
        else:
            self.jobs.end_job(job, JobState.CANCELLED, _shutting_down())

    async def _run_job(self, job: Job, placement: Placement) -> None:
        """Run a job to its success, on the next epoch of workers if one is lost."""
        spec = job.record.spec
        job_id = job.record.job_id
        self.traces.end_queueing(job_id)
        async with self._videos.hold_video(spec.video_id) as video:
            if job.extension is not None:
                plan = job.extension.plan
            else:
                with self.traces.span(job_id, "plan"):
                    plan = await self._admission.plan_held(spec, video)
                self.jobs.update_prefix(job, plan)
            attempt = PrefillAttempt(
                job_id=job_id,
                spec=spec,
                plan=plan,
                video=video,
                placement=placement,
                base_id=job.extension.base.record.prefix_id if job.extension else "",
                on_start=lambda: self._record_start(job),
                on_progress=job.update_progress,
            )
            retries = RetryPolicy(placement.subgroup)
            while not await self._try(job, attempt, retries):
                self.jobs.save(job.update(state=JobState.QUEUED))

    async def _try(self, job: Job, attempt: PrefillAttempt, retries: RetryPolicy) -> bool:
        """Whether an attempt has succeeded; False if it has failed and is to be repeated."""
        starts = job.record.attempts
        try:
            result, report = await self._runner.run(attempt)
            if report is not None:
                self.jobs.save_report(job, report)
            self.jobs.end_job(job, JobState.SUCCEEDED, result=result)
        except ServiceError as error:
            started = job.record.attempts > starts  # else the workers cannot even start
            retry = started and retries.should_retry(error, job.record.attempts)
            if not retry or job.cancelled_by:
                raise
            logger.warning("%s: %s; trying again", job.record.job_id, error)
            return False
        return True

    def _record_start(self, job: Job) -> None:
        attempts = job.record.attempts + 1
        self.jobs.save(
            job.update(state=JobState.RUNNING, attempts=attempts, start_time=time.time())
        )

    def _forget_epoch(self, epoch: int, error: ServiceError) -> None:
        logger.warning("epoch %d of the workers is gone, with its prefixes", epoch)
        self.prefixes.forget_epoch(epoch)


def _begins_with(token_ids: np.ndarray, prefix: np.ndarray) -> bool:
    """Whether a prompt begins with a prefix, and goes on after it."""
    return len(prefix) < len(token_ids) and np.array_equal(token_ids[: len(prefix)], prefix)


def _shutting_down() -> ServiceError:
    return ServiceError(Reason.SHUTTING_DOWN, "the service is shutting down; ask again later")
