"""Backups of data folders that are in use, and what comes back from them."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import sqlite3
from pathlib import Path

import pytest

from prefill_service.cli.main import main
from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.job_store import JobStore
from prefill_service.storage.backup import back_up
from prefill_service.storage.sqlite_database import BACKUP_LOCK, SqliteDatabase
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.scheduling.test_job_store import record
from tests.video.uploading import create, digest, upload


def open_store(data_dir: Path) -> VideoStore:
    storage = StorageConfig(data_dir=str(data_dir), min_free_bytes=0)
    return VideoStore.open(storage, VideoConfig(spare_decoders=0))


async def test_a_backup_of_a_service_at_work_is_a_data_folder(tmp_path: Path, video: bytes) -> None:
    data_dir = tmp_path / "data"
    copy = tmp_path / "copy"
    store = open_store(data_dir)
    jobs = JobStore.open(data_dir / "jobs.db")
    ready = await upload(store, video)
    begun = await create(store, video + b"more")
    await store.append_chunk(begun.video_id, 0, video[:100])
    job = record()
    jobs.insert_record(job)
    stop = asyncio.Event()

    async def keep_writing() -> int:
        for number in itertools.count():
            if stop.is_set():
                return number
            await store.create_upload("later", 1, f"{number:064x}")
        raise AssertionError

    writing = asyncio.create_task(keep_writing())
    report = await asyncio.to_thread(back_up, data_dir, copy)
    stop.set()
    assert await writing > 0
    assert (report.videos, report.jobs) == (1, 1)
    assert report.num_bytes > len(video)
    await store.delete_video(ready.video_id)
    await store.close()
    jobs.close()

    restored = open_store(copy)
    assert await restored.get_video(ready.video_id) == ready
    async with restored.hold_video(ready.video_id) as held:
        assert held.path.read_bytes() == video
        assert held.index_path.exists()
    assert (await restored.get_video(begun.video_id)).committed_bytes == 100
    await restored.append_chunk(begun.video_id, 100, video[100:] + b"more")
    assert (await restored.finish_upload(begun.video_id)).state is VideoState.READY
    await restored.close()
    restored_jobs = JobStore.open(copy / "jobs.db")
    assert restored_jobs.get_record(job.job_id) == job
    restored_jobs.close()


def test_no_write_comes_between_the_copied_files(tmp_path: Path) -> None:
    database = SqliteDatabase.open(tmp_path / "a.db", "database", (), durable=True)
    lock = os.open(tmp_path / BACKUP_LOCK, os.O_RDWR)

    def change(db: sqlite3.Connection) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        changed.append(db)

    changed: list[sqlite3.Connection] = []
    database.commit(change)
    assert changed
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
    database.close()


async def test_damaged_bytes_are_not_backed_up(tmp_path: Path, video: bytes) -> None:
    store = open_store(tmp_path / "data")
    ready = await upload(store, video)
    async with store.hold_video(ready.video_id) as held:
        path = held.path
    with path.open("r+b") as file:
        file.seek(len(video) // 2)
        file.write(b"rot")
    with pytest.raises(ServiceError, match=f"{ready.video_id} have sha256") as caught:
        await asyncio.to_thread(back_up, tmp_path / "data", tmp_path / "copy")
    assert caught.value.metadata["sha256"] == digest(path.read_bytes())
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    await store.close()


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="is no data folder") as caught:
        back_up(tmp_path / "none", tmp_path / "copy")
    assert caught.value.reason is Reason.CONFIG_INVALID
    asyncio.run(open_store(tmp_path / "data").close())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "file").touch()
    with pytest.raises(ServiceError, match="is not an empty folder"):
        back_up(tmp_path / "data", tmp_path / "copy")
    with pytest.raises(ServiceError, match="cannot back up to /proc/copy"):
        back_up(tmp_path / "data", Path("/proc/copy"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = tmp_path / "data"
    asyncio.run(open_store(data_dir).close())
    command = ["backup", str(tmp_path / "copy"), "--data-dir", str(data_dir)]
    assert main(command) == 0
    assert "has 0 videos, 0 unfinished or failed uploads and 0 jobs" in capsys.readouterr().out
    assert main(command) == 2
    assert "is not an empty folder [CONFIG_INVALID]" in capsys.readouterr().err
