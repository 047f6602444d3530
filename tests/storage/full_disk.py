"""What is done on a full disk: ``python -m tests.storage.full_disk FOLDER SCENARIO ...``.

The folder is the root of a small file system that this process has for itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import sys
from collections.abc import Awaitable
from pathlib import Path

import grpc
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill.v1 import video_service_pb2 as video_pb

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.storage.small_disk import Ballast
from tests.support.in_process_service import answer, error_of, serving

NO_RESERVE_OF_UPLOADS = -(1 << 40)
"""The check of free space must not come before the real error."""


def open_store(data_dir: Path) -> VideoStore:
    storage = StorageConfig(data_dir=str(data_dir), min_free_bytes=NO_RESERVE_OF_UPLOADS)
    return VideoStore.open(storage, VideoConfig(spare_decoders=0))


async def add_video(store: VideoStore, data: bytes, *, salt: int) -> str:
    """A READY video whose bytes are like no other's: containers end where they say."""
    data += salt.to_bytes(4, "big")
    made = await store.create_upload(f"{salt}", len(data), hashlib.sha256(data).hexdigest())
    await store.append_chunk(made.video_id, 0, data)
    assert (await store.finish_upload(made.video_id)).state is VideoState.READY
    return made.video_id


async def reason_of(awaitable: Awaitable[object]) -> Reason | None:
    """Why it is refused; ``None`` if it is not."""
    try:
        await awaitable
    except ServiceError as error:
        return error.reason
    return None


def change_database(data_dir: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    database = sqlite3.connect(data_dir / "videos.db")
    with database:
        rows = database.execute(statement, values).fetchall()
    database.close()
    return rows


async def videos(disk: Path, sample: str) -> None:
    """Deletions, expiry, holds, refusals and a restart, all with no byte free."""
    data_dir = disk / "data"
    ballast = Ballast(disk)
    data = Path(sample).read_bytes()
    store = open_store(data_dir)
    kept, deleted, held, expired, last = [await add_video(store, data, salt=i) for i in range(5)]
    begun = await store.create_upload("begun", len(data), hashlib.sha256(data).hexdigest())
    await store.append_chunk(begun.video_id, 0, data[:1000])
    complete = hashlib.sha256(data + b"complete").hexdigest()
    unindexed = await store.create_upload("unindexed", len(data) + 8, complete)
    await store.append_chunk(unindexed.video_id, 0, data + b"complete")
    await store.close()
    change_database(data_dir, "UPDATE videos SET expire_time = 0 WHERE video_id = ?", expired)
    store = open_store(data_dir)

    ballast.fill()
    assert (await store.get_video(kept)).state is VideoState.READY
    # What cannot be kept is refused, and nothing is left of it.
    folders = len(list((data_dir / "videos").iterdir()))
    for number in range(1000):  # the write-ahead log may have room for some
        refusal = await reason_of(store.create_upload("more", 1 << 20, f"{number:064x}"))
        if refusal is not None:
            break
        folders += 1
    assert refusal is Reason.STORAGE_FULL
    assert len(list((data_dir / "videos").iterdir())) == folders
    assert await reason_of(store.append_chunk(begun.video_id, 1000, data[1000:])) is (
        Reason.STORAGE_FULL
    )
    assert (await store.get_video(begun.video_id)).committed_bytes == 1000
    # No room for an index: the bytes are kept.
    assert await reason_of(store.finish_upload(unindexed.video_id)) is Reason.STORAGE_FULL
    assert (await store.get_video(unindexed.video_id)).committed_bytes == len(data) + 8

    # A video that is held goes at once, its files when the hold ends.
    async with store.hold_video(held) as video:
        await store.delete_video(held)
        assert await reason_of(store.get_video(held)) is Reason.UNKNOWN_VIDEO
        assert hashlib.file_digest(video.path.open("rb"), "sha256").digest()
    assert not video.path.parent.exists()
    ballast.fill()
    await store.delete_video(deleted)
    assert await reason_of(store.get_video(deleted)) is Reason.UNKNOWN_VIDEO
    ballast.fill()
    assert await store.delete_expired() == [expired]
    ballast.fill()

    # A start on a full disk, and a deletion after it.
    await store.close()
    ballast.fill()
    store = open_store(data_dir)
    ballast.fill()
    await store.delete_video(last)
    left = {kept, begun.video_id, unindexed.video_id}
    names = {row.video_id: row.display_name for row in (await store.list_videos(1000))[0]}
    assert {video_id for video_id, name in names.items() if name != "more"} == left

    # With room again, all goes on where it stopped.
    ballast.remove()
    await store.append_chunk(begun.video_id, 1000, data[1000:])
    for video_id in left:
        assert (await store.finish_upload(video_id)).state is VideoState.READY
        async with store.hold_video(video_id) as video:
            with video.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            assert digest == video.record.sha256
    await store.close()
    assert change_database(data_dir, "PRAGMA integrity_check") == [("ok",)]
    reserves = [path.stat().st_size for path in data_dir.glob("*-reserve")]
    assert reserves == [512 << 10], "the reserve was not filled again"


async def service(disk: Path, template: str, video_id: str) -> None:
    """The whole service, its backends simulated: answers, jobs and deletions over the API."""
    ballast = Ballast(disk)
    async with serving(disk / "data", (Path(template), video_id)) as s:
        before = await answer(s.ask())
        ballast.fill()
        assert (await answer(s.ask())).text == before.text
        jobs = []
        for frames in range(10, 400):  # each another prefix, until the log is full
            try:
                jobs.append(await s.create(frames))
            except grpc.aio.AioRpcError:
                break
        code, reason, metadata, details = await error_of(s.create(frames))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert metadata["path"].endswith("jobs.db")
        assert "RetryInfo" in details
        again = await answer(s.ask())  # the prefix in memory needs no disk
        assert again.text == before.text
        for job in jobs:  # those that were taken end, and say so
            assert (await s.ended(job.job_id))[-1].state == prefill_pb.JOB_STATE_SUCCEEDED
        await s.videos.DeleteVideo(video_pb.DeleteVideoRequest(video_id=video_id))
        code, reason, *_ = await error_of(s.create(frames))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIDEO")
        ballast.remove()
    database = sqlite3.connect(disk / "data" / "jobs.db")
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    states = dict(database.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state").fetchall())
    assert states == {"SUCCEEDED": len(jobs) + 1}
    database.close()


if __name__ == "__main__":
    scenario = {"videos": videos, "service": service}[sys.argv[2]]
    asyncio.run(scenario(Path(sys.argv[1]), *sys.argv[3:]))
