"""VideoService over a socket, with the real store."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefill.v1 import video_service_pb2 as pb
from prefill.v1 import video_service_pb2_grpc

from prefill_service.api.limits import MAX_CHUNK_BYTES
from tests.support.in_process_service import InProcessService, answer, error_of
from tests.video.sample_videos import make_video

Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def clip(make_video: Callable[..., Path]) -> bytes:
    """A video that is not in the template."""
    return make_video(seconds=1).read_bytes()


async def create(s: InProcessService, data: bytes, **fields: Any) -> pb.CreateUploadResponse:
    digest = hashlib.sha256(data).hexdigest()
    request = pb.CreateUploadRequest(
        **{"display_name": "clip.mp4", "size_bytes": len(data), "sha256": digest, **fields}
    )
    return await s.videos.CreateUpload(request)


async def send(s: InProcessService, video_id: str, chunks: Sequence[tuple[int, bytes]]) -> int:
    async def requests() -> Any:
        for number, (offset, data) in enumerate(chunks):
            name = "" if number else video_id
            yield pb.UploadChunksRequest(video_id=name, offset=offset, data=data)

    return (await s.videos.UploadChunks(requests())).committed_bytes


async def status_of(s: InProcessService, video_id: str) -> pb.GetUploadStatusResponse:
    return await s.videos.GetUploadStatus(pb.GetUploadStatusRequest(video_id=video_id))


async def first_done(waits: Sequence[asyncio.Future[Any]]) -> Any:
    """What comes first; the others are cancelled."""
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    return done.pop().result()


@asynccontextmanager
async def proxy(target: str, source: str) -> AsyncIterator[str]:
    """An address whose connections reach the target from another address of this machine."""
    host, port = target.split(":")
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
        tasks.add(asyncio.create_task(pump(reader, there[1])))
        tasks.add(asyncio.create_task(pump(there[0], writer)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_video_says_its_geometry_and_what_the_model_refuses(
    serve: Serve, tmp_path: Path
) -> None:
    options = {"x264-params": "sar=2/1", "preset": "veryfast"}
    path = make_video(tmp_path / "v.ts", frames=4, size=(1600, 8), options=options)
    data = path.read_bytes()
    async with serve() as s:
        video_id = (await create(s, data)).video.video_id
        await send(s, video_id, [(0, data)])
        finished = (await s.videos.FinishUpload(pb.FinishUploadRequest(video_id=video_id))).video
        again = (await s.videos.GetVideo(pb.GetVideoRequest(video_id=video_id))).video
        listed = (await s.videos.ListVideos(pb.ListVideosRequest())).videos[0]
    assert finished == again == listed
    info = finished.info
    assert (info.width, info.height) == (3200, 8)
    assert info.stored == pb.FrameSize(width=1600, height=8, frames=4)
    assert list(info.sizes) == [info.stored]
    assert info.sample_aspect_ratio == pb.SampleAspectRatio(numerator=2, denominator=1)
    assert [warning.reason for warning in finished.warnings] == ["PIXEL_ASPECT", "FRAME_SHAPE"]
    assert "400 > 200" in finished.warnings[1].message


async def test_upload_in_pieces_finish_get_list_delete(serve: Serve, clip: bytes) -> None:
    async with serve() as s:
        created = await create(s, clip)
        video_id = created.video.video_id
        assert created.max_chunk_bytes == MAX_CHUNK_BYTES
        assert created.video.state == pb.VIDEO_STATE_UPLOADING
        half = len(clip) // 2
        assert await send(s, video_id, [(0, clip[:100]), (100, clip[100:half])]) == half
        status = await s.videos.GetUploadStatus(pb.GetUploadStatusRequest(video_id=video_id))
        assert (status.committed_bytes, status.size_bytes) == (half, len(clip))
        assert not status.complete
        code, reason, metadata, _ = await error_of(send(s, video_id, [(half + 1, b"x")]))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_OFFSET_MISMATCH")
        assert metadata["committed_bytes"] == str(half)
        finish = pb.FinishUploadRequest(video_id=video_id)
        assert (await error_of(s.videos.FinishUpload(finish)))[1] == "UPLOAD_INCOMPLETE"
        await send(s, video_id, [(half, clip[half:])])
        video = (await s.videos.FinishUpload(finish)).video
        assert video.state == pb.VIDEO_STATE_READY
        assert (video.display_name, video.info.codec != "") == ("clip.mp4", True)
        assert video.info.frame_count > 0
        assert video.expire_time.seconds > video.create_time.seconds
        assert (await s.videos.GetVideo(pb.GetVideoRequest(video_id=video_id))).video == video
        listed = await s.videos.ListVideos(pb.ListVideosRequest(page_size=1))
        assert [v.video_id for v in listed.videos] == [video_id]
        rest = pb.ListVideosRequest(page_token=listed.next_page_token)
        assert [v.video_id for v in (await s.videos.ListVideos(rest)).videos] == [s.video_id]
        assert (await create(s, clip)).video.video_id == video_id  # same bytes, same video
        await s.videos.DeleteVideo(pb.DeleteVideoRequest(video_id=video_id))
        code, reason, _, _ = await error_of(
            s.videos.GetVideo(pb.GetVideoRequest(video_id=video_id))
        )
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIDEO")


async def test_what_is_wrong_with_a_file_is_said_in_the_video_and_in_answers(
    serve: Serve, tmp_path: Path
) -> None:
    parts = [make_video(tmp_path / "v.ts", frames=12).read_bytes() for _ in range(2)]
    async with serve() as s:
        created = await create(s, b"".join(parts))
        s.video_id = created.video.video_id
        await send(s, s.video_id, [(0, b"".join(parts))])
        finish = pb.FinishUploadRequest(video_id=s.video_id)
        video = (await s.videos.FinishUpload(finish)).video
        (warning,) = video.warnings
        assert warning.reason == "CLOCK_RESTARTS"
        assert "set back once, first at frame 12 (1.200 s)" in warning.message
        assert (await s.videos.GetVideo(pb.GetVideoRequest(video_id=s.video_id))).video == video
        assert list((await answer(s.ask())).final.warnings) == [warning]


async def test_create_is_idempotent(serve: Serve, clip: bytes) -> None:
    async with serve() as s:
        key = str(uuid.uuid4())
        first = await create(s, clip, request_id=key)
        assert (await create(s, clip, request_id=key)).video.video_id == first.video.video_id
        assert (await create(s, clip)).video.video_id != first.video.video_id
        assert (await error_of(create(s, clip, request_id="17")))[1] == "INVALID_REQUEST"


async def test_bad_streams(serve: Serve, clip: bytes) -> None:
    async with serve() as s:
        video_id = (await create(s, clip)).video.video_id
        for chunks in ([], [(0, b"x" * (MAX_CHUNK_BYTES + 1))]):
            assert (await error_of(send(s, video_id, chunks)))[1] == "INVALID_REQUEST"
        assert (await error_of(send(s, "", [(0, b"x")])))[1] == "INVALID_REQUEST"
        assert (await error_of(send(s, "vid_x", [(0, b"x")])))[1] == "UNKNOWN_VIDEO"

        async def two_videos() -> Any:
            yield pb.UploadChunksRequest(video_id=video_id, offset=0, data=b"x")
            yield pb.UploadChunksRequest(video_id="vid_other", offset=1, data=b"x")

        assert (await error_of(s.videos.UploadChunks(two_videos())))[1] == "INVALID_REQUEST"
        status = await s.videos.GetUploadStatus(pb.GetUploadStatusRequest(video_id=video_id))
        assert status.committed_bytes == 1  # what came before the bad message stays


async def test_broken_stream_keeps_what_was_received(serve: Serve, clip: bytes) -> None:
    async with serve() as s:
        video_id = (await create(s, clip)).video.video_id
        call = s.videos.UploadChunks()
        await call.write(pb.UploadChunksRequest(video_id=video_id, offset=0, data=clip[:1000]))
        request = pb.GetUploadStatusRequest(video_id=video_id)

        async def committed() -> int:
            return (await s.videos.GetUploadStatus(request)).committed_bytes

        for _ in range(100):
            if await committed() == 1000:
                break
        call.cancel()
        assert await committed() == 1000
        await send(s, video_id, [(1000, clip[1000:])])
        finish = pb.FinishUploadRequest(video_id=video_id)
        assert (await s.videos.FinishUpload(finish)).video.state == pb.VIDEO_STATE_READY


async def test_upload_of_a_deleted_video_ends(serve: Serve, clip: bytes) -> None:
    async with serve() as s:
        video_id = (await create(s, clip)).video.video_id
        call = s.videos.UploadChunks()
        await call.write(pb.UploadChunksRequest(video_id=video_id, data=clip[:9]))
        while not (await status_of(s, video_id)).committed_bytes:
            await asyncio.sleep(0.01)
        await s.videos.DeleteVideo(pb.DeleteVideoRequest(video_id=video_id))
        await call.write(pb.UploadChunksRequest(offset=9, data=clip[9:]))
        code, reason, _, _ = await error_of(call)
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIDEO")


async def test_silent_upload_ends_and_can_be_resumed(serve: Serve, clip: bytes) -> None:
    async with serve(server={"upload_idle_seconds": 0.3}) as s:
        video_id = (await create(s, clip)).video.video_id
        never = s.videos.UploadChunks()
        begun = s.videos.UploadChunks()
        await begun.write(pb.UploadChunksRequest(video_id=video_id, data=clip[:9]))
        for call in (never, begun):
            code, reason, metadata, details = await error_of(call)
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "UPLOAD_IDLE")
            assert metadata == {"limit_s": "0.3"}
            assert "RetryInfo" in details
        assert (await status_of(s, video_id)).committed_bytes == 9
        assert await send(s, video_id, [(9, clip[9:])]) == len(clip)


async def test_silent_uploads_lock_nobody_out(serve: Serve, clip: bytes) -> None:
    """One address has its share of the uploads, and uploads are no calls."""
    limits = {"max_uploads": 4, "max_concurrent_calls": 2}
    async with serve(server=limits) as s, proxy(s.address, "127.0.0.2") as address:
        silent = [s.videos.UploadChunks() for _ in range(4)]
        refused = await first_done([asyncio.ensure_future(error_of(call)) for call in silent])
        code, reason, metadata, _ = refused
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert metadata == {"limit": "3"}
        video_id = (await create(s, clip)).video.video_id
        async with grpc.aio.insecure_channel(address) as channel:
            elsewhere = video_service_pb2_grpc.VideoServiceStub(channel)
            request = pb.UploadChunksRequest(video_id=video_id, data=clip)
            done = await elsewhere.UploadChunks(iter([request]))
        assert done.committed_bytes == len(clip)
        for call in silent:
            call.cancel()


async def test_refused_file_is_failed_with_its_reason(serve: Serve) -> None:
    async with serve() as s:
        data = b"#EXTM3U\nhttp://127.0.0.1/secret\n"
        video_id = (await create(s, data)).video.video_id
        await send(s, video_id, [(0, data)])
        code, reason, _, _ = await error_of(
            s.videos.FinishUpload(pb.FinishUploadRequest(video_id=video_id))
        )
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        video = (await s.videos.GetVideo(pb.GetVideoRequest(video_id=video_id))).video
        assert (video.state, video.error_reason) == (pb.VIDEO_STATE_FAILED, reason)
        assert video.error_message
        s.video_id = video_id
        code, reason, _, _ = await error_of(s.create())
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VIDEO_NOT_READY")


async def test_import_below_an_allowed_root(serve: Serve, tmp_path: Path, clip: bytes) -> None:
    root = tmp_path / "films"
    root.mkdir()
    (root / "a.mp4").write_bytes(clip)
    (tmp_path / "b.mp4").write_bytes(clip)
    async with serve(storage={"import_roots": [str(root)]}) as s:
        request = pb.ImportVideoRequest(path=str(root / "a.mp4"))
        video = (await s.videos.ImportVideo(request)).video
        assert (video.state, video.display_name) == (pb.VIDEO_STATE_READY, "a.mp4")
        outside = pb.ImportVideoRequest(path=str(tmp_path / "b.mp4"))
        code, reason, _, _ = await error_of(s.videos.ImportVideo(outside))
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
