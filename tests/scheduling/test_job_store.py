"""The job database alone: what a crash leaves behind."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import AttentionReport, BlockMap, LayerReport
from prefill_service.engine.messages import Progress
from prefill_service.engine.spans import Stage
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import new_id
from prefill_service.models.prefix_plan import FrameSampling, SampleBy
from prefill_service.scheduling.attention_summary import AttentionDetail, summarize
from prefill_service.scheduling.job import JobRecord, JobState, PrefillResult, PrefillSpec
from prefill_service.scheduling.job_store import JobStore
from prefill_service.video.index import VideoWarning, WarningReason

SAMPLING = FrameSampling(fps=2.0, by=SampleBy.TIME)
SPEC = PrefillSpec("vid_1", SAMPLING, "Be brief.", resolve_policy(epsilon=0.05))
SUMMARY = summarize(SPEC.attention, AttentionReport(layers=[LayerReport(0, [30.0, 20.0], 55.0, 4)]))
RESULT = PrefillResult(
    prefix_id="p",
    prefix_tokens=10,
    video_tokens=8,
    frames=4,
    grid_thw=(2, 4, 4),
    position_delta=-5,
    shards=((0, 5, 0), (5, 10, 1)),
    kv_bytes=640,
    kv_transfer_params_json="{}",
    manifest_json="{}",
    attention=SUMMARY,
    unlisted_frames=1,
    warnings=(VideoWarning(WarningReason.SIZE_CHANGES, "1 of the 4 frames"),),
)


def record(**fields: object) -> JobRecord:
    base = JobRecord(new_id("job"), SPEC, "p", 10, explicit=True, create_time=4e9)
    return replace(base, **fields)  # type: ignore[arg-type]


def test_records_survive_unchanged(tmp_path: Path) -> None:
    job = record(
        state=JobState.SUCCEEDED,
        attempts=2,
        start_time=1.5,
        end_time=2.5,
        result=RESULT,
        progress=(Progress("job", 1, Stage.VISION, 3, 4, 0.5),),
    )
    failed = record(state=JobState.FAILED, error={"reason": "X", "message": "m", "metadata": {}})
    store = JobStore.open(tmp_path / "jobs.db")
    for each in (job, failed):
        store.insert_record(each)
    store.close()
    store = JobStore.open(tmp_path / "jobs.db")
    assert store.get_record(job.job_id) == job
    assert store.get_record(job.job_id).spec.sampling.by is SampleBy.TIME
    assert store.get_record(failed.job_id) == failed


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
    store = JobStore.open(tmp_path / "jobs.db")
    for job in jobs.values():
        store.insert_record(job)
    store.close()
    store = JobStore.open(tmp_path / "jobs.db")
    queue = store.recover(max_attempts=2)
    assert [job.job_id for job in queue] == [jobs["queued"].job_id, jobs["running"].job_id]
    assert queue[1].attempts == 1  # the lost start counts
    states = {
        name: store.get_record(job.job_id).state for name, job in jobs.items() if name != "old"
    }
    assert states == {
        "queued": JobState.QUEUED,
        "running": JobState.QUEUED,
        "culprit": JobState.FAILED,
        "orphan": JobState.CANCELLED,
        "done": JobState.EVICTED,
        "cancelled": JobState.CANCELLED,
    }
    with pytest.raises(ServiceError) as error:
        store.get_record(jobs["old"].job_id)
    assert error.value.reason is Reason.UNKNOWN_JOB


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    path.write_bytes(b"this is no database, but it is long enough to look at" * 40)
    with pytest.raises(ServiceError, match="cannot use the job database") as error:
        JobStore.open(path)
    assert error.value.reason is Reason.CONFIG_INVALID
    path.unlink()
    JobStore.open(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(ServiceError, match="has version 7, this build reads 2"):
        JobStore.open(path)


def test_reports_live_as_long_as_their_jobs(tmp_path: Path) -> None:
    kept = record()
    old = record(state=JobState.EVICTED, create_time=1.0)
    report = AttentionDetail(SUMMARY, BlockMap(0, 1, 1, 2, [0.5, -1.0]), ((0.0, 1.5), (0.5, 0.25)))
    store = JobStore.open(tmp_path / "jobs.db")
    for job in (kept, old):
        store.insert_record(job)
        store.save_report(job.job_id, report)
    assert store.count_by_state() == {**dict.fromkeys(JobState, 0), "QUEUED": 1, "EVICTED": 1}
    store.close()
    store = JobStore.open(tmp_path / "jobs.db")
    assert store.find_report(old.job_id) == report
    store.recover(max_attempts=2)
    assert store.find_report(kept.job_id) == report
    assert store.find_report(old.job_id) is None


def test_a_database_from_before_sparse_attention_is_taken_over(tmp_path: Path) -> None:
    """As version 1 wrote it: no word of attention, which was exact."""
    path = tmp_path / "jobs.db"
    queued = record()
    done = record(state=JobState.SUCCEEDED, result=RESULT)
    store = JobStore.open(path)
    store.insert_record(queued, "request")
    store.insert_record(done)
    store.close()
    with sqlite3.connect(path) as db:
        for job in (queued, done):
            data = asdict(job)
            del data["spec"]["attention"]
            if data["result"]:
                del data["result"]["attention"]
            db.execute(
                "UPDATE jobs SET record = ? WHERE job_id = ?", (json.dumps(data), job.job_id)
            )
        spec = asdict(SPEC)
        del spec["attention"]
        db.execute("UPDATE requests SET spec = ?", (json.dumps(spec),))
        db.execute("DROP TABLE reports")
        db.execute("PRAGMA user_version = 1")
    db.close()
    store = JobStore.open(path)
    exact = replace(SPEC, attention=resolve_policy(Quality.EXACT))
    assert store.get_record(queued.job_id) == replace(queued, spec=exact)
    result = store.get_record(done.job_id).result
    assert result is not None
    assert (result.attention.total.density, result.attention.layers) == (1.0, ())
    assert [job.job_id for job in store.recover(max_attempts=2)] == [queued.job_id]
    assert store.find_report(done.job_id) is None
    assert store.find_request("request", SPEC) == queued.job_id  # sent again as it was
    with pytest.raises(ServiceError, match="with another spec"):
        store.find_request("request", replace(SPEC, system_prompt=""))
