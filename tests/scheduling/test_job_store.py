"""The job database alone: what a crash leaves behind."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from prefill_service.engine.messages import Progress, Stage
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import new_id
from prefill_service.models.plan import FrameSampling
from prefill_service.scheduling.job_store import JobStore
from prefill_service.scheduling.jobs import JobRecord, JobState, PrefillResult, PrefillSpec

SPEC = PrefillSpec("vid_1", FrameSampling(fps=2.0), "Be brief.")
RESULT = PrefillResult("p", 10, 8, 4, (2, 4, 4), -5, ((0, 5, 0), (5, 10, 1)), 640, "{}", "{}")


def record(**fields: object) -> JobRecord:
    base = JobRecord(new_id("job"), SPEC, "p", 10, explicit=True, create_time=4e9)
    return replace(base, **fields)  # type: ignore[arg-type]


def test_records_survive_unchanged(tmp_path: Path) -> None:
    job = record(
        state=JobState.SUCCEEDED, attempts=2, start_time=1.5, end_time=2.5, result=RESULT,
        progress=(Progress("job", 1, Stage.VISION, 3, 4, 0.5),),
    )  # fmt: skip
    failed = record(state=JobState.FAILED, error={"reason": "X", "message": "m", "metadata": {}})
    store = JobStore(tmp_path / "jobs.db")
    for each in (job, failed):
        store.insert(each)
    store.close()
    store = JobStore(tmp_path / "jobs.db")
    assert store.get(job.job_id) == job
    assert store.get(failed.job_id) == failed


def test_recovery_after_a_crash(tmp_path: Path) -> None:
    jobs = {
        "queued": record(),
        "running": record(state=JobState.RUNNING, attempts=1),
        "culprit": record(state=JobState.RUNNING, attempts=2),
        "orphan": record(state=JobState.RUNNING, attempts=1, explicit=False),
        "done": record(state=JobState.SUCCEEDED, result=RESULT),
        "cancelled": record(state=JobState.CANCELLED),
        "old": record(state=JobState.FAILED, create_time=1.0),
    }
    store = JobStore(tmp_path / "jobs.db")
    for job in jobs.values():
        store.insert(job)
    store.close()
    store = JobStore(tmp_path / "jobs.db")
    queue = store.recover(max_attempts=2)
    assert [job.job_id for job in queue] == [jobs["queued"].job_id, jobs["running"].job_id]
    assert queue[1].attempts == 1  # the lost start counts
    states = {name: store.get(job.job_id).state for name, job in jobs.items() if name != "old"}
    assert states == {
        "queued": JobState.QUEUED,
        "running": JobState.QUEUED,
        "culprit": JobState.FAILED,
        "orphan": JobState.CANCELLED,
        "done": JobState.EVICTED,
        "cancelled": JobState.CANCELLED,
    }
    with pytest.raises(ServiceError) as error:
        store.get(jobs["old"].job_id)
    assert error.value.reason is Reason.UNKNOWN_JOB


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(b"this is no database, but it is long enough to look at" * 40)
    with pytest.raises(ServiceError, match="cannot use the job database") as error:
        JobStore(path)
    assert error.value.reason is Reason.CONFIG_INVALID
    path.unlink()
    JobStore(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(ServiceError, match="has version 7, this build reads 1"):
        JobStore(path)
