"""Uploads in chunks: offsets, sizes, digests, refusals, and callers that collide."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video import store as store_module
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.uploading import create, digest, files_of, refused


async def test_upload_in_chunks_becomes_ready(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    assert record.state is VideoState.UPLOADING
    assert record.video_id.startswith("vid_")
    assert len(record.video_id) == 30
    for offset in range(0, len(video), 1000):
        chunk = video[offset : offset + 1000]
        assert await store.append_chunk(record.video_id, offset, chunk) == offset + len(chunk)
    done = await store.finish_upload(record.video_id)
    assert done.state is VideoState.READY
    assert done.committed_bytes == done.size_bytes == len(video)
    assert done.info is not None
    assert (*done.info.geometry.display_hw, done.info.frame_count) == (64, 96, 40)
    assert (
        done == await store.finish_upload(record.video_id) == await store.get_video(record.video_id)
    )
    async with store.hold_video(record.video_id) as held:
        assert held.path.read_bytes() == video
        assert VideoIndex.load(held.index_path).frame_count == 40


async def test_wrong_offset_names_both_numbers_and_loses_nothing(
    store: VideoStore, video: bytes
) -> None:
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video[:1000])
    for offset in (0, 999, 1001):
        error = await refused(
            Reason.UPLOAD_OFFSET_MISMATCH, store.append_chunk(record.video_id, offset, b"x")
        )
        assert error.metadata == {"offset": str(offset), "committed_bytes": "1000"}
    assert (await store.get_video(record.video_id)).committed_bytes == 1000
    await store.append_chunk(record.video_id, 1000, video[1000:])
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_more_than_announced_is_refused(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    await refused(Reason.UPLOAD_SIZE_EXCEEDED, store.append_chunk(record.video_id, 0, video + b"x"))
    assert (await store.get_video(record.video_id)).committed_bytes == 0


async def test_finish_before_the_end_says_how_much_is_there(
    store: VideoStore, video: bytes
) -> None:
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video[:10])
    error = await refused(Reason.UPLOAD_INCOMPLETE, store.finish_upload(record.video_id))
    assert error.metadata == {"committed_bytes": "10", "size_bytes": str(len(video))}


async def test_wrong_digest_starts_the_upload_again(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    broken = video[:-1] + bytes([video[-1] ^ 1])
    await store.append_chunk(record.video_id, 0, broken)
    error = await refused(Reason.UPLOAD_DIGEST_MISMATCH, store.finish_upload(record.video_id))
    assert error.metadata == {"sha256": digest(broken), "announced_sha256": digest(video)}
    assert (await store.get_video(record.video_id)).committed_bytes == 0
    await store.append_chunk(record.video_id, 0, video)
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_refused_file_is_failed_with_its_reason_and_gone(store: VideoStore) -> None:
    text = b"not a video at all\n" * 100
    record = await create(store, text)
    await store.append_chunk(record.video_id, 0, text)
    for _ in range(2):  # finishing again says the same
        await refused(Reason.NOT_A_VIDEO, store.finish_upload(record.video_id))
    failed = await store.get_video(record.video_id)
    assert (failed.state, failed.error_reason) == (VideoState.FAILED, "NOT_A_VIDEO")
    assert failed.error_message
    assert files_of(store, record.video_id) == []
    await refused(Reason.NOT_A_VIDEO, store.append_chunk(record.video_id, 0, text))
    await refused(Reason.VIDEO_NOT_READY, store.hold_video(record.video_id).__aenter__())
    assert (await create(store, text)).video_id != record.video_id  # may be tried again


async def test_concurrent_finishes_index_once(
    store: VideoStore, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = []

    async def counted(
        path: Path, limits: VideoConfig, pool: DecoderPool | None, *, allow_truncated: bool
    ) -> VideoIndex:
        indexed.append(path)
        return await index_video(path, limits, pool, allow_truncated=allow_truncated)

    monkeypatch.setattr(store_module, "index_video", counted)
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video)
    gone = asyncio.create_task(store.finish_upload(record.video_id))
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(store.finish_upload(record.video_id)) for _ in range(4)]
    gone.cancel()  # one client leaves, the others get their answer
    done = await asyncio.gather(*others)
    assert {r.state for r in done} == {VideoState.READY}
    assert len(indexed) == 1


async def test_of_two_concurrent_writers_one_wins(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    for offset in range(0, len(video), 500):
        chunk = video[offset : offset + 500]
        results = await asyncio.gather(
            *(store.append_chunk(record.video_id, offset, chunk) for _ in range(3)),
            return_exceptions=True,
        )
        assert results.count(offset + len(chunk)) == 1
        reasons = [r.reason for r in results if isinstance(r, ServiceError)]
        # After the last chunk the losers' offset is not committed; before it neither.
        assert reasons == [Reason.UPLOAD_OFFSET_MISMATCH] * 2
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_ready_video_with_the_same_digest_is_returned(
    store: VideoStore, video: bytes
) -> None:
    first = await create(store, video)
    second = await create(store, video)  # the first is not READY yet
    assert second.video_id != first.video_id
    await store.append_chunk(first.video_id, 0, video)
    await store.finish_upload(first.video_id)
    third = await create(store, video, sha256=digest(video).upper(), display_name="other")
    assert (third.video_id, third.state) == (first.video_id, VideoState.READY)


async def test_request_id_returns_the_first_result(store: VideoStore, video: bytes) -> None:
    request_id = str(uuid.uuid4())
    records = await asyncio.gather(*(create(store, video, request_id=request_id) for _ in range(5)))
    assert len({record.video_id for record in records}) == 1
    await refused(Reason.INVALID_REQUEST, create(store, video, request_id=request_id, size_bytes=1))
    assert (await create(store, video)).video_id != records[0].video_id


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"size_bytes": 0}, Reason.INVALID_REQUEST, "size_bytes"),
        ({"size_bytes": -5}, Reason.INVALID_REQUEST, "-5"),
        ({"size_bytes": (8 << 30) + 1}, Reason.UPLOAD_SIZE_EXCEEDED, str(8 << 30)),
        ({"sha256": "abc"}, Reason.INVALID_REQUEST, "sha256"),
        ({"sha256": ""}, Reason.INVALID_REQUEST, "sha256"),
        ({"sha256": "g" * 64}, Reason.INVALID_REQUEST, "64 hexadecimal"),
        ({"display_name": "n" * 256}, Reason.INVALID_REQUEST, "255"),
    ],
)
async def test_bad_arguments_are_named(
    changes: dict, reason: Reason, named: str, store: VideoStore, video: bytes
) -> None:
    assert named in (await refused(reason, create(store, video, **changes))).message
    assert (await store.list_videos())[0] == []
