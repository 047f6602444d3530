"""The client's uploads against the project's own VideoService: store, probing and errors."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from client_helpers import Api, make_client, until

from prefill.v1 import video_service_pb2_grpc
from prefill_client import InvalidVideoError, NotFoundError, RetryPolicy, VideoState

pytest.importorskip("prefill_service.video.store", reason="the server is not installed")

from prefill_service.api.grpc_server import OPTIONS
from prefill_service.api.interceptor import CallInterceptor
from prefill_service.api.security import BearerToken
from prefill_service.api.video_service import VideoServicer
from prefill_service.config import ServerConfig, StorageConfig, VideoConfig
from prefill_service.scheduling.metrics import Metrics
from prefill_service.video.store import VideoStore
from tools.make_video import write_video

PATIENT = RetryPolicy(attempts=30, initial_delay_s=0.1, max_delay_s=0.5)


class VideoServer:
    """The real service over a folder; a restart opens the folder anew, as a process would."""

    def __init__(self, folder: Path) -> None:
        self.storage = StorageConfig(data_dir=str(folder), import_roots=[str(folder.parent)])
        self.port = 0
        self.delay_s = 0.0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.start()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        self._call(self._start())

    def stop(self) -> None:
        self._call(self._stop())

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self) -> None:
        self._store = VideoStore.open(self.storage, VideoConfig())
        append = self._store.append_chunk

        async def slow_append(*args: Any) -> int:
            await asyncio.sleep(self.delay_s)
            return await append(*args)

        self._store.append_chunk = slow_append  # type: ignore[method-assign]
        metrics = Metrics()
        config = ServerConfig()
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(config, metrics, BearerToken(config))],
            options=OPTIONS,
        )
        servicer = VideoServicer(self._store, metrics)
        video_service_pb2_grpc.add_VideoServiceServicer_to_server(servicer, self._server)
        self.port = self._server.add_insecure_port(f"localhost:{self.port}")
        await self._server.start()

    async def _stop(self) -> None:
        await self._server.stop(0)
        await self._store.close()


@pytest.fixture
def video_server(tmp_path):
    server = VideoServer(tmp_path / "data")
    yield server
    server.close()


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    path = write_video(tmp_path_factory.mktemp("mp4") / "real.mp4", seconds=8.0)
    padding = 1 << 20  # a "free" box, to have some chunks to send
    with path.open("ab") as file:
        file.write((padding + 8).to_bytes(4, "big") + b"free" + bytes(padding))
    return path


@pytest.fixture
async def real(kind, video_server):
    client = make_client(kind, video_server.address, retry=PATIENT, upload_retry=PATIENT)
    yield Api(client)
    closed = client.close()
    if closed is not None:
        await closed


async def test_life_of_a_video(real: Api, video_server, mp4, tmp_path):
    seen = []
    video = await real.call("upload", mp4, progress=seen.append)
    assert video.state is VideoState.READY
    assert video.sha256 == hashlib.sha256(mp4.read_bytes()).hexdigest()
    assert (video.info.width, video.info.height, video.info.frame_count) == (320, 240, 200)
    assert video.display_name == "real.mp4"
    assert seen[-1].phase == "probe"
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(mp4.read_bytes())
    again = await real.call("upload", copy)
    assert again.video_id == video.video_id
    imported = await real.call("import_video", str(copy), display_name="imported")
    assert imported.state is VideoState.READY
    ids = {video.video_id, imported.video_id}
    assert {v.video_id for v in await real.collect("videos", page_size=1)} == ids
    for video_id in ids:
        await real.call("delete_video", video_id)
    with pytest.raises(NotFoundError):
        await real.call("video", video.video_id)
    assert (await real.call("upload", mp4)).video_id not in ids


async def test_restart_in_mid_upload(real: Api, video_server, mp4):
    size = mp4.stat().st_size
    video_server.delay_s = 0.2
    sent = []
    upload = asyncio.ensure_future(real.call("upload", mp4, progress=sent.append))
    folder = Path(video_server.storage.data_dir) / "videos"
    await until(lambda: any(f.stat().st_size for f in folder.glob("*/input.bin")))
    await asyncio.to_thread(video_server.stop)
    left = [f.stat().st_size for f in folder.glob("*/input.bin")]
    assert 0 < left[0] < size
    video_server.delay_s = 0.0
    await asyncio.to_thread(video_server.start)
    video = await upload
    assert video.state is VideoState.READY
    assert video.committed_bytes == size
    assert left[0] in {p.done for p in sent if p.phase == "upload"}  # it went on from there


async def test_refused_files(real: Api, tmp_path, mp4):
    text = tmp_path / "text.mp4"
    text.write_text("hello " * 100)
    for _ in range(2):
        with pytest.raises(InvalidVideoError) as caught:
            await real.call("upload", text)
        assert caught.value.reason == "NOT_A_VIDEO"
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(mp4.read_bytes()[:150_000])
    with pytest.raises(InvalidVideoError):
        await real.call("upload", torn)
