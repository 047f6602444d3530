"""Durable jobs: SQLite in write-ahead mode, so that a restart resumes the queue.

Each call is one short local transaction without fsync, so it is made on the event loop, which also
makes it atomic with respect to the scheduler's own state. A crash of the process loses none. A
power cut may lose those after the last ``sync``, which is called before a client is answered.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from dataclasses import asdict, replace
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.paging import check_page
from prefill_service.scheduling.attention_summary import AttentionDetail
from prefill_service.scheduling.job import JobRecord, JobState, PrefillSpec
from prefill_service.storage.sqlite_database import SqliteDatabase, Upgrade, run_script

KEEP_S = 30 * 24 * 3600.0
"""Ended jobs and request ids are forgotten after this."""

_JOBS = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    create_time REAL NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX jobs_state ON jobs (state);
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    job_id TEXT NOT NULL,
    spec TEXT NOT NULL,
    create_time REAL NOT NULL
)
"""
_REPORTS = """
CREATE TABLE reports (
    job_id TEXT PRIMARY KEY,
    report TEXT NOT NULL
)
"""
UPGRADES: tuple[Upgrade, ...] = (
    lambda db: run_script(db, _JOBS),
    lambda db: run_script(db, _REPORTS),
)
"""By the version found. What was released once stays as it is; changes are further ones.
Records of version 1 know nothing of attention: they were all exact."""


class JobStore:
    """The job database, opened by ``open``.

    Raises:
        ServiceError: STORAGE_FULL when a write finds the disk full.
    """

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> JobStore:
        """Open a database, which is made or brought to this version if need be.

        Raises:
            ServiceError: CONFIG_INVALID if the file is not a job database of this version.
        """
        return cls(SqliteDatabase.open(path, "job database", UPGRADES, durable=False))

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    async def sync(self) -> None:
        """Wait until everything written before survives a power cut."""
        await asyncio.to_thread(self._database.sync)

    def insert_record(self, record: JobRecord, request_id: str = "") -> None:
        """Add the record of a new job, and the request that it is for if it has an id."""

        def insert(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO jobs (job_id, state, create_time, record) VALUES (?, ?, ?, ?)",
                (record.job_id, record.state, record.create_time, _dump(record)),
            )
            _remember_request(db, request_id, record.job_id, record.spec)

        self._database.commit(insert)

    def join_record(self, record: JobRecord, request_id: str, spec: PrefillSpec) -> None:
        """Keep that a client's request led to a job that there was; its record is explicit."""

        def update(db: sqlite3.Connection) -> None:
            _update(db, record)
            _remember_request(db, request_id, record.job_id, spec)

        self._database.commit(update)

    def update_record(self, record: JobRecord) -> None:
        """Replace a job's record by a newer one, of what has happened already."""
        self._database.commit(lambda db: _update(db, record), essential=True)

    def get_record(self, job_id: str) -> JobRecord:
        """The record of one job.

        Raises:
            ServiceError: UNKNOWN_JOB.
        """
        rows = self._database.query("SELECT record FROM jobs WHERE job_id = ?", (job_id,))
        if not rows:
            raise ServiceError(Reason.UNKNOWN_JOB, f"there is no job {job_id!r}", job_id=job_id)
        return _load(rows[0][0])

    def count_by_state(self) -> dict[str, int]:
        """How many jobs are in each state; states without a job are 0."""
        rows = self._database.query("SELECT state, COUNT(*) AS count FROM jobs GROUP BY state")
        counts = dict.fromkeys(map(str, JobState), 0)
        return counts | {row["state"]: row["count"] for row in rows}

    def save_report(self, job_id: str, report: AttentionDetail) -> None:
        """Keep a job's attention report for as long as the job is listed."""
        values = (job_id, json.dumps(asdict(report), separators=(",", ":")))
        self._database.commit(
            lambda db: db.execute("INSERT OR REPLACE INTO reports VALUES (?, ?)", values)
        )

    def find_report(self, job_id: str) -> AttentionDetail | None:
        """A job's attention report, if it has one."""
        rows = self._database.query("SELECT report FROM reports WHERE job_id = ?", (job_id,))
        return AttentionDetail.from_dict(json.loads(rows[0][0])) if rows else None

    def list_records(
        self, page_size: int, page_token: str
    ) -> tuple[list[tuple[str, JobRecord]], bool]:
        """One page of records, newest first, each with the token of the page after it.

        Returns:
            (token, job) pairs, and whether there are more.

        Raises:
            ServiceError: INVALID_REQUEST for a bad size or token.
        """
        size, before = check_page(page_size, page_token)
        rows = self._database.query(
            "SELECT seq, record FROM jobs WHERE seq < ? ORDER BY seq DESC LIMIT ?",
            (before, size + 1),
        )
        return [(str(seq), _load(text)) for seq, text in rows[:size]], len(rows) > size

    def find_request(self, request_id: str, spec: PrefillSpec) -> str | None:
        """The job an earlier request with this id led to.

        Raises:
            ServiceError: INVALID_REQUEST if that request had another content.
        """
        rows = self._database.query(
            "SELECT job_id, spec FROM requests WHERE request_id = ?", (request_id,)
        )
        if not rows:
            return None
        (row,) = rows
        earlier = json.loads(row[1])
        content = asdict(spec)
        if "attention" not in earlier:  # of version 1: the client may be repeating it unchanged
            del content["attention"]
        earlier.setdefault("comparison", None)  # of before there were any
        if earlier != content:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"request_id {request_id} was used before with another spec (job {row[0]})",
                request_id=request_id,
                job_id=row[0],
            )
        return str(row[0])

    def recover(self, max_attempts: int) -> list[JobRecord]:
        """Settle what an earlier process left behind; returns the queue, oldest first.

        Finished prefixes lived in that process's ranks: EVICTED. Jobs that only calls waited
        for end with those calls: CANCELLED. A job that was running is queued again, unless it
        has been started ``max_attempts`` times: it may be what brought the process down.
        """
        now = time.time()
        queue: list[JobRecord] = []

        def settle_all(db: sqlite3.Connection) -> None:
            db.execute(
                "DELETE FROM jobs WHERE state NOT IN ('QUEUED', 'RUNNING') AND create_time < ?",
                (now - KEEP_S,),
            )
            db.execute("DELETE FROM requests WHERE create_time < ?", (now - KEEP_S,))
            db.execute("DELETE FROM reports WHERE job_id NOT IN (SELECT job_id FROM jobs)")
            rows = db.execute(
                "SELECT record FROM jobs WHERE state IN ('QUEUED', 'RUNNING', 'SUCCEEDED') "
                "ORDER BY seq"
            ).fetchall()
            queue.clear()
            for record in (_load(text) for (text,) in rows):
                settled = _settle(record, max_attempts, now)
                _update(db, settled)
                if settled.state is JobState.QUEUED:
                    queue.append(settled)

        self._database.commit(settle_all, essential=True)
        return queue


def _settle(record: JobRecord, max_attempts: int, now: float) -> JobRecord:
    if record.state is JobState.SUCCEEDED:
        return replace(record, state=JobState.EVICTED, result=None)
    if not record.explicit:
        error = ServiceError(
            Reason.CANCELLED, "the service stopped, and with it the calls that waited for this job"
        )
        return replace(record, state=JobState.CANCELLED, end_time=now, error=error.to_dict())
    if record.state is JobState.RUNNING and record.attempts >= max_attempts:
        error = ServiceError(
            Reason.PREFILL_FAILED,
            f"the service stopped during attempt {record.attempts} of {max_attempts} at this job",
            attempts=record.attempts,
            max_attempts=max_attempts,
        )
        return replace(record, state=JobState.FAILED, end_time=now, error=error.to_dict())
    return replace(record, state=JobState.QUEUED, progress=())


def _dump(record: JobRecord) -> str:
    return json.dumps(record.to_dict(), separators=(",", ":"))


def _load(text: str) -> JobRecord:
    return JobRecord.from_dict(json.loads(text))


def _update(db: sqlite3.Connection, record: JobRecord) -> None:
    db.execute(
        "UPDATE jobs SET state = ?, record = ? WHERE job_id = ?",
        (record.state, _dump(record), record.job_id),
    )


def _remember_request(
    db: sqlite3.Connection, request_id: str, job_id: str, spec: PrefillSpec
) -> None:
    if request_id:
        db.execute(
            "INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?)",
            (request_id, job_id, json.dumps(asdict(spec)), time.time()),
        )
