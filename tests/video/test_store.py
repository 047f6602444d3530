"""Stored videos: ids, pages, holds, deletion and expiry."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.uploading import OpenStore, create, files_of, refused, upload


async def test_unknown_ids(store: VideoStore) -> None:
    calls = [store.get_video, store.finish_upload, store.delete_video]
    for call in calls:
        error = await refused(Reason.UNKNOWN_VIDEO, call("vid_nothing"))
        assert error.metadata == {"video_id": "vid_nothing"}
    await refused(Reason.UNKNOWN_VIDEO, store.append_chunk("../../etc", 0, b"x"))
    await refused(Reason.UNKNOWN_VIDEO, store.hold_video("vid_nothing").__aenter__())
    assert store._repository._locks.keys() <= {"create", "import", "vid_nothing"}


async def test_ids_that_are_paths_reach_no_files(store: VideoStore, tmp_path: Path) -> None:
    """A prefill or question names a video; whatever it names, nothing outside is touched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in ("../../outside", str(outside), "..", ".", "", "vid_../../../outside"):
        await refused(Reason.UNKNOWN_VIDEO, store.hold_video(path).__aenter__())
    assert outside.is_dir()
    assert (tmp_path / "data" / "videos").is_dir()


async def test_pages_are_newest_first_and_complete(store: VideoStore, video: bytes) -> None:
    made = [(await create(store, video)).video_id for _ in range(7)]
    seen = []
    token = ""
    while True:
        page, token = await store.list_videos(page_size=3, page_token=token)
        seen += [record.video_id for record in page]
        if not token:
            break
    assert seen == made[::-1]
    assert len((await store.list_videos(page_size=5000))[0]) == 7
    await refused(Reason.INVALID_REQUEST, store.list_videos(page_size=-1))
    await refused(Reason.INVALID_REQUEST, store.list_videos(page_token="rubbish"))


async def test_deleted_video_stays_while_it_is_held(store: VideoStore, video: bytes) -> None:
    record = await upload(store, video)
    async with store.hold_video(record.video_id) as held:
        async with store.hold_video(record.video_id):
            await store.delete_video(record.video_id)
        await refused(Reason.UNKNOWN_VIDEO, store.get_video(record.video_id))
        await refused(Reason.UNKNOWN_VIDEO, store.delete_video(record.video_id))
        assert held.path.read_bytes() == video
    assert files_of(store, record.video_id) == []
    assert not store._holds
    assert (await create(store, video)).state is VideoState.UPLOADING  # no stale duplicate


async def test_deleting_a_video_stops_its_indexing(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video)
    finishing = asyncio.create_task(store.finish_upload(record.video_id))
    await asyncio.sleep(0.1)
    await store.delete_video(record.video_id)
    with pytest.raises(ServiceError):
        await finishing
    assert files_of(store, record.video_id) == []
    await refused(Reason.UNKNOWN_VIDEO, store.get_video(record.video_id))


async def test_expired_videos_that_nobody_uses_are_deleted(
    open_store: OpenStore, video: bytes, samples: dict[str, Path]
) -> None:
    store = open_store(expire_hours=2 / 3600)
    ready = await upload(store, video)
    held = await upload(store, samples["h264_one_frame"].read_bytes())
    half = await create(store, b"12345")
    await store.append_chunk(half.video_id, 0, b"123")
    assert await store.delete_expired() == []
    async with store.hold_video(held.video_id):
        await asyncio.sleep(2.2)
        await store.append_chunk(half.video_id, 3, b"4")  # an upload that goes on does not expire
        assert await store.delete_expired() == [ready.video_id]
    assert files_of(store, ready.video_id) == []
    assert (await store.get_video(held.video_id)).expire_time > time.time()  # using it moved it on
    await asyncio.sleep(2.2)
    assert set(await store.delete_expired()) == {held.video_id, half.video_id}
    assert list(store._repository.videos_dir.iterdir()) == []


async def test_holding_a_video_moves_its_expiry(open_store: OpenStore, video: bytes) -> None:
    store = open_store(expire_hours=1)
    record = await upload(store, video)
    await asyncio.sleep(0.05)
    async with store.hold_video(record.video_id) as held:
        assert held.record.expire_time > record.expire_time
