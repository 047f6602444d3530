"""Databases as earlier releases left them."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.job import JobState
from prefill_service.scheduling.job_store import JobStore
from prefill_service.storage.sqlite_database import SqliteDatabase, run_script
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.scheduling.test_job_store import record

VIDEOS_WITHOUT_VERSION = """
CREATE TABLE videos (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    video_id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL,
    state TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    create_time REAL NOT NULL,
    expire_time REAL NOT NULL,
    info TEXT NOT NULL DEFAULT '',
    error_reason TEXT NOT NULL DEFAULT '',
    error_message TEXT NOT NULL DEFAULT ''{columns}
);
CREATE INDEX videos_by_digest ON videos (sha256, state);
CREATE TABLE requests (
    request_id TEXT PRIMARY KEY,
    arguments TEXT NOT NULL,
    video_id TEXT NOT NULL REFERENCES videos (video_id) ON DELETE CASCADE
);
INSERT INTO videos (video_id, display_name, state, size_bytes, sha256, create_time, expire_time)
    VALUES ('vid_01m8j7ah1n37pvfr5wfba6wta0', 'robot.mp4', 'UPLOADING', 12,
            '0000000000000000000000000000000000000000000000000000000000000001', 1e9, 4e9);
INSERT INTO requests VALUES ('5d0c4b4e-5b0c-4b4e-9b0c-4b4e5d0c4b4e', '["upload"]',
            'vid_01m8j7ah1n37pvfr5wfba6wta0');
"""
CUT_FILES = ",\n    allow_truncated INTEGER NOT NULL DEFAULT 0"
"""The column of releases that took what can be read of a cut file."""

JOBS_2 = """
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
);
CREATE TABLE reports (
    job_id TEXT PRIMARY KEY,
    report TEXT NOT NULL
);
PRAGMA user_version = 2;
"""


def make_database(path: Path, script: str) -> None:
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode = WAL")
    database.executescript(script)
    database.close()


def read(path: Path, query: str) -> list[tuple[object, ...]]:
    database = sqlite3.connect(path)
    rows = database.execute(query).fetchall()
    database.close()
    return rows


@pytest.mark.parametrize("columns", ["", CUT_FILES])
async def test_videos_of_releases_that_counted_no_versions(tmp_path: Path, columns: str) -> None:
    make_database(tmp_path / "videos.db", VIDEOS_WITHOUT_VERSION.replace("{columns}", columns))
    folder = tmp_path / "videos" / "vid_01m8j7ah1n37pvfr5wfba6wta0"
    folder.mkdir(parents=True)
    (folder / "input.bin").write_bytes(b"abc")
    store = VideoStore.open(StorageConfig(data_dir=str(tmp_path)), VideoConfig())
    ((found,), token) = await store.list_videos()
    assert token == ""
    assert (found.display_name, found.state) == ("robot.mp4", VideoState.UPLOADING)
    assert (found.committed_bytes, found.size_bytes, found.expire_time) == (3, 12, 4e9)
    await store.delete_video(found.video_id)
    await store.close()
    assert read(tmp_path / "videos.db", "PRAGMA user_version") == [(1,)]
    assert read(tmp_path / "videos.db", "SELECT COUNT(*) FROM requests") == [(0,)]


def test_jobs_of_the_last_release(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    make_database(path, JOBS_2)
    job = record(state=JobState.CANCELLED)
    database = sqlite3.connect(path)
    with database:
        database.execute(
            "INSERT INTO jobs (job_id, state, create_time, record) VALUES (?, ?, ?, ?)",
            (job.job_id, job.state, job.create_time, json.dumps(job.to_dict())),
        )
    database.close()
    store = JobStore.open(path)
    assert store.get_record(job.job_id) == job
    store.close()


def test_a_later_release_s_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "videos.db"
    make_database(path, "CREATE TABLE films (name TEXT);\nPRAGMA user_version = 9;")
    before = path.read_bytes()
    with pytest.raises(ServiceError, match="has version 9, this build reads 1") as caught:
        VideoStore.open(StorageConfig(data_dir=str(tmp_path)), VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert path.read_bytes() == before


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    def fail(db: sqlite3.Connection) -> None:
        run_script(db, "CREATE TABLE second (a); CREATE TABLE first (a)")

    first = lambda db: run_script(db, "CREATE TABLE first (a)")  # noqa: E731
    SqliteDatabase.open(path, "database", [first], durable=True).close()
    with pytest.raises(ServiceError, match="table first already exists"):
        SqliteDatabase.open(path, "database", [first, fail], durable=True)
    assert read(path, "SELECT name FROM sqlite_master") == [("first",)]
    assert read(path, "PRAGMA user_version") == [(1,)]
