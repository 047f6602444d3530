"""The jobs of this service: the live ones, and the records of all it ever had."""

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
from prefill_service.scheduling.traces import TraceStore, render_trace

logger = logging.getLogger(__name__)


class JobRegistry:
    """The live jobs (queued, running or resident), by id and by prefix, and all records.

    Args:
        store: keeps the records.
        metrics: counts each job that ends.
        traces: of the latest jobs.
        count_ahead: how many jobs are before a waiting one.
    """

    def __init__(
        self,
        store: JobStore,
        metrics: Metrics,
        traces: TraceStore,
        count_ahead: Callable[[Job], int],
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._traces = traces
        self._count_ahead = count_ahead
        self._jobs: dict[str, Job] = {}
        self._by_prefix: dict[str, Job] = {}
        self._unsaved: dict[str, JobRecord] = {}
        self._unsaved_reports: dict[str, AttentionDetail] = {}

    # ---- reading ------------------------------------------------------------------------

    def find_live(self, job_id: str) -> Job | None:
        """A live job by its id."""
        return self._jobs.get(job_id)

    def find_by_prefix(self, prefix_id: str) -> Job | None:
        """The live job that has or makes a prefix."""
        return self._by_prefix.get(prefix_id)

    @property
    def live(self) -> Iterable[Job]:
        """All live jobs."""
        return self._jobs.values()

    def get_record(self, job_id: str) -> JobRecord:
        """The job as it is now.

        Raises:
            ServiceError: UNKNOWN_JOB.
        """
        job = self._jobs.get(job_id)
        if job is not None:
            return self.snapshot(job)
        return self._unsaved.get(job_id) or self._store.get_record(job_id)

    def get_report(self, job_id: str) -> tuple[JobRecord, AttentionDetail]:
        """The job and the attention report of its prefill, also when its prefix is gone.

        Raises:
            ServiceError: UNKNOWN_JOB; NO_ATTENTION_REPORT if it has not succeeded.
        """
        record = self.get_record(job_id)
        report = self._unsaved_reports.get(job_id) or self._store.find_report(job_id)
        if report is None:
            why = _why_no_report(record)
            raise ServiceError(
                Reason.NO_ATTENTION_REPORT,
                f"job {job_id} is {record.state} and has no attention report: {why}",
                job_id=job_id,
                state=record.state,
            )
        return record, report

    def render_trace(self, job_id: str) -> bytes:
        """The trace of a job that has ended, as JSON (``traces.render_trace``).

        Raises:
            ServiceError: UNKNOWN_JOB; NO_TRACE while it is active and when its trace was let go.
        """
        record = self.get_record(job_id)
        trace = self._traces.find_trace(job_id)
        if trace is None or record.active:
            kept = f"those of the last {self._traces.jobs} jobs since the service started are kept"
            why = "there is one once it has ended" if record.active else kept
            raise ServiceError(
                Reason.NO_TRACE,
                f"job {job_id} is {record.state} and has no trace: {why}",
                job_id=job_id,
                state=record.state,
            )
        return render_trace(job_id, trace)

    def list_records(
        self, page_size: int, page_token: str
    ) -> tuple[list[tuple[str, JobRecord]], bool]:
        """``JobStore.list_records`` with live progress."""
        rows, more = self._store.list_records(page_size, page_token)
        live = self._jobs
        return [
            (
                token,
                self.snapshot(live[job.job_id])
                if job.job_id in live
                else self._unsaved.get(job.job_id, job),
            )
            for token, job in rows
        ], more

    def snapshot(self, job: Job) -> JobRecord:
        """A job's record with its progress and position in the queue."""
        return job.snapshot(self._count_ahead(job))

    # ---- changing -----------------------------------------------------------------------

    def add_job(self, job: Job) -> None:
        """Add a live job whose record is in the store."""
        self._jobs[job.record.job_id] = job
        self._by_prefix[job.record.prefix_id] = job

    def save(self, record: JobRecord) -> None:
        """Keep a job's new state; a database that fails must not stop the ranks."""
        self._unsaved[record.job_id] = record
        self.write_unsaved()

    def save_report(self, job: Job, report: AttentionDetail) -> None:
        """Keep a job's attention report; the prefix is good without it, as with ``save``."""
        self._unsaved_reports[job.record.job_id] = report
        self.write_unsaved()

    def write_unsaved(self) -> None:
        """Write what a full disk kept in memory, as far as it has room now."""
        try:
            for job_id, record in list(self._unsaved.items()):
                self._store.update_record(record)
                del self._unsaved[job_id]
            for job_id, report in list(self._unsaved_reports.items()):
                self._store.save_report(job_id, report)
                del self._unsaved_reports[job_id]
        except (ServiceError, sqlite3.Error) as error:
            logger.error(
                "%d states of jobs and %d reports are in memory only: %s",
                len(self._unsaved),
                len(self._unsaved_reports),
                error,
            )

    def update_prefix(self, job: Job, plan: PrefixPlan) -> None:
        """Give a job the prefix of its plan: after a restart with another model it is another."""
        if job.record.prefix_id != plan.prefix_id:
            self._unindex(job)
            self._by_prefix[plan.prefix_id] = job
            self.save(job.update(prefix_id=plan.prefix_id, prefix_tokens=plan.num_tokens))

    def end_job(
        self,
        job: Job,
        state: JobState,
        error: ServiceError | None = None,
        result: PrefillResult | None = None,
    ) -> None:
        """Note that a job has ended; it stays live if it has succeeded."""
        if state is not JobState.SUCCEEDED:
            self._unindex(job)
            del self._jobs[job.record.job_id]
        logger.info("%s: %s%s", job.record.job_id, state, f", {error}" if error else "")
        self._metrics.record_job_end(state)
        self.save(
            job.update(
                state=state,
                error=error.to_dict() if error else None,
                result=result,
                end_time=time.time(),
            )
        )

    def end_evicted(self, prefix_id: str) -> None:
        """Note that a complete prefix is gone, and with it the job that had it."""
        job = self._by_prefix.get(prefix_id)
        if job is not None and job.record.state is JobState.SUCCEEDED:
            self._unindex(job)
            del self._jobs[job.record.job_id]
            self.save(job.update(state=JobState.EVICTED, result=None))

    def _unindex(self, job: Job) -> None:
        if self._by_prefix.get(job.record.prefix_id) is job:
            del self._by_prefix[job.record.prefix_id]


def _why_no_report(record: JobRecord) -> str:
    if record.state not in (JobState.SUCCEEDED, JobState.EVICTED):
        return "there is one once a job has succeeded"
    if record.spec.comparison is not None:
        return "it was computed by a baseline, whose attention is not measured"
    return "it is from before there were any, or the disk was full"
