"""The jobs of this service: those it has in hand, and the records of all it ever had."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.scheduling.attention_summary import AttentionDetail
from prefill_service.scheduling.job import Job, JobRecord, JobState, PrefillResult
from prefill_service.scheduling.job_store import JobStore
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.traces import TraceBook, render

logger = logging.getLogger(__name__)


class JobRegistry:
    """Jobs that are queued, running or resident, by id and by prefix, and their records.

    Args:
        store: has the records.
        metrics: told of each job that ends.
        ahead: how many jobs are before a waiting one.
    """

    def __init__(self, store: JobStore, metrics: Metrics, ahead: Callable[[Job], int]) -> None:
        self._store, self._metrics, self._ahead = store, metrics, ahead
        self.traces = TraceBook()
        self._jobs: dict[str, Job] = {}
        self._by_prefix: dict[str, Job] = {}

    # ---- to be read ---------------------------------------------------------------------

    def in_hand(self, job_id: str) -> Job | None:
        """A job that is queued, running or resident."""
        return self._jobs.get(job_id)

    def of_prefix(self, prefix_id: str) -> Job | None:
        """The job in hand that has or makes a prefix."""
        return self._by_prefix.get(prefix_id)

    def all_in_hand(self) -> Iterable[Job]:
        """Every one."""
        return self._jobs.values()

    def get(self, job_id: str) -> JobRecord:
        """The job as it is now.

        Raises:
            ServiceError: UNKNOWN_JOB.
        """
        job = self._jobs.get(job_id)
        return self.snapshot(job) if job else self._store.get(job_id)

    def inspect(self, job_id: str) -> tuple[JobRecord, AttentionDetail]:
        """The job and the attention report of its prefill, also when its prefix is gone.

        Raises:
            ServiceError: UNKNOWN_JOB; NO_ATTENTION_REPORT if it has not succeeded.
        """
        record = self.get(job_id)
        report = self._store.report(job_id)
        if report is None:
            succeeded = record.state in (JobState.SUCCEEDED, JobState.EVICTED)
            why = (
                "it was computed by a comparison mode, whose attention is not measured"
                if succeeded and record.spec.comparison is not None
                else "it is from before there were any, or the disk was full"
                if succeeded
                else "there is one once a job has succeeded"
            )
            raise ServiceError(
                Reason.NO_ATTENTION_REPORT,
                f"job {job_id} is {record.state} and has no attention report: {why}",
                job_id=job_id, state=record.state,
            )  # fmt: skip
        return record, report

    def trace(self, job_id: str) -> bytes:
        """When what was done for a job that has ended, as JSON (``traces.render``).

        Raises:
            ServiceError: UNKNOWN_JOB; NO_TRACE while it is active and when its trace was let go.
        """
        record, trace = self.get(job_id), self.traces.get(job_id)
        if trace is None or record.active:
            why = (
                "there is one once it has ended"
                if record.active
                else f"those of the last {self.traces.jobs} jobs since the service started are kept"
            )
            raise ServiceError(
                Reason.NO_TRACE, f"job {job_id} is {record.state} and has no trace: {why}",
                job_id=job_id, state=record.state,
            )  # fmt: skip
        return render(job_id, trace)

    def page(self, page_size: int, page_token: str) -> tuple[list[tuple[str, JobRecord]], bool]:
        """``JobStore.page`` with live progress."""
        rows, more = self._store.page(page_size, page_token)
        live = self._jobs
        return [
            (token, self.snapshot(live[job.job_id]) if job.job_id in live else job)
            for token, job in rows
        ], more

    def snapshot(self, job: Job) -> JobRecord:
        """A job's record with its progress and position in the queue."""
        return job.snapshot(self._ahead(job))

    # ---- what happens to jobs -----------------------------------------------------------

    def add(self, job: Job) -> None:
        """Take a job in hand, whose record is in the store."""
        self._jobs[job.record.job_id] = job
        self._by_prefix[job.record.prefix_id] = job

    def save(self, record: JobRecord) -> None:
        """Note a change of state; a database that fails must not stop the ranks."""
        try:
            self._store.update(record)
        except (ServiceError, sqlite3.Error) as error:
            logger.error("%s is now %s, but: %s", record.job_id, record.state, error)

    def keep_report(self, job: Job, report: AttentionDetail) -> None:
        """As ``_save``: the prefix is good without it."""
        try:
            self._store.save_report(job.record.job_id, report)
        except (ServiceError, sqlite3.Error) as error:
            logger.error("%s: its attention report is lost: %s", job.record.job_id, error)

    def rename(self, job: Job, plan: PrefixPlan) -> None:
        """After a restart with another model the same spec is another prefix."""
        old = job.record.prefix_id
        if old != plan.prefix_id:
            self._unindex(job)
            self._by_prefix[plan.prefix_id] = job
            self.save(job.update(prefix_id=plan.prefix_id, prefix_tokens=plan.num_tokens))

    def end(
        self,
        job: Job,
        state: JobState,
        error: ServiceError | None = None,
        result: PrefillResult | None = None,
    ) -> None:
        """A job is over; unless it has succeeded, its prefix is not there."""
        if state is not JobState.SUCCEEDED:
            self._unindex(job)
            del self._jobs[job.record.job_id]
        logger.info("%s: %s%s", job.record.job_id, state, f", {error}" if error else "")
        self._metrics.job_ended(state)
        self.save(
            job.update(
                state=state,
                error=error.to_dict() if error else None,
                result=result,
                end_time=time.time(),
            )
        )

    def evicted(self, prefix_id: str) -> None:
        """A complete prefix is gone, and with it the job that had it."""
        job = self._by_prefix.get(prefix_id)
        if job is not None and job.record.state is JobState.SUCCEEDED:
            self._unindex(job)
            del self._jobs[job.record.job_id]
            self.save(job.update(state=JobState.EVICTED, result=None))

    def _unindex(self, job: Job) -> None:
        if self._by_prefix.get(job.record.prefix_id) is job:
            del self._by_prefix[job.record.prefix_id]
