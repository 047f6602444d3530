"""The frame stream: waiting, back-pressure, stalls, deaths, cancellation."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.indexer import index_video
from tests.video.processes import alive, children, wait_until
from tests.video.sample_videos import make_video, read_number


@pytest.fixture(scope="module")
def big_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    path = make_video(folder / "v.mp4", "mpeg4", 120, size=(960, 540), options={"g": "12"})
    asyncio.run(index_video(path, VideoConfig())).save(folder / "index.npz")
    return path


def stream_of(path: Path, wanted: list[int], limits: VideoConfig | None = None) -> FrameStream:
    return FrameStream.open(path, path.with_name("index.npz"), wanted, limits or VideoConfig())


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_poll_returns_none_until_a_frame_is_there(big_video: Path) -> None:
    with stream_of(big_video, [5, 6]) as stream:
        started = time.monotonic()
        assert stream.poll(0.0) is None  # the process has hardly started
        assert time.monotonic() - started < 0.2
        frames = []
        assert wait_until(lambda: (f := stream.poll(0.05)) is not None and frames.append(f) is None)
        assert [read_number(f) for f in [*frames, *stream]] == [5, 6]
        assert stream.remaining == 0
        assert stream.poll(0.0) is None


def test_child_waits_for_its_reader_in_bounded_memory(big_video: Path) -> None:
    with stream_of(big_video, list(range(120))) as stream:
        assert stream.poll(30) is not None
        pid = stream._session.pid
        time.sleep(1.0)
        before = cpu_s(pid)
        time.sleep(1.0)
        assert cpu_s(pid) - before < 0.2  # blocked, not decoding ahead
        held = rss_bytes(pid)
        for _ in range(100):
            assert stream.poll(30) is not None
        assert rss_bytes(pid) < held + 40e6  # 100 frames are 155 MB


def test_close_kills_the_child_and_can_be_repeated(big_video: Path) -> None:
    stream = stream_of(big_video, [0, 119])
    pid = stream._session.pid
    folder = Path(stream._session._folder.name)
    assert alive(pid)
    assert not any(folder.iterdir())
    stream.close()
    stream.close()
    assert not alive(pid)
    assert not folder.exists()


def test_child_dies_with_its_parent(big_video: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from prefill_service.config import VideoConfig
from prefill_service.video.frame_stream import FrameStream
path = Path({str(big_video)!r})
stream = FrameStream.open(path, path.with_name("index.npz"), range(120), VideoConfig())
assert stream.poll(30) is not None
print(stream._session.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    assert wait_until(lambda: not alive(pid))


def test_stopped_child_is_a_timeout(big_video: Path) -> None:
    limits = VideoConfig(stall_timeout_s=2.0)
    with stream_of(big_video, [0, 100], limits) as stream:
        pid = stream._session.pid
        assert wait_until(lambda: stream.poll(0.5) is not None)
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            list(stream)
        assert caught.value.reason is Reason.DECODE_TIMEOUT
        assert caught.value.metadata["frame_index"] == "100"
        assert 0.5 < time.monotonic() - started < 4
        assert not alive(pid)


def test_frame_that_waited_for_a_busy_reader_is_no_stall(big_video: Path) -> None:
    limits = VideoConfig(stall_timeout_s=1.5)
    with stream_of(big_video, [0, 1, 2], limits) as stream:
        assert wait_until(lambda: stream.poll(0.5) is not None)
        time.sleep(2.0)
        assert [read_number(frame) for frame in stream] == [1, 2]


def kill_decoders(stream: FrameStream, number: int) -> list[np.ndarray]:
    """Read on while each process is killed before it has sent the frame that is waited for."""
    frames = []
    pid = 0
    while stream.remaining:
        if stream._session.pid != pid:
            pid = stream._session.pid
            os.kill(pid, number)
        if (frame := stream.poll(30)) is not None:
            frames.append(frame)
    return frames


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGXCPU, Reason.DECODE_TIMEOUT),
        (signal.SIGSEGV, Reason.DECODE_FAILED),
        (signal.SIGKILL, Reason.VIDEO_DECODER_KILLED),
    ],
)
def test_deaths_of_the_child_are_explained(big_video: Path, number: int, reason: Reason) -> None:
    """The file is blamed for a second crash at one frame, and never for a kill from outside."""
    with stream_of(big_video, list(range(120))) as stream, pytest.raises(ServiceError) as caught:
        kill_decoders(stream, number)
    assert caught.value.reason is reason
    assert signal.Signals(number).name in str(caught.value) or number == signal.SIGXCPU


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_frames_go_on_after_a_death_of_the_child(big_video: Path, number: int) -> None:
    with stream_of(big_video, [0, 0, 5, 50, 119]) as stream:
        assert wait_until(lambda: stream.poll(0.5) is not None)
        before = stream._session.pid
        os.kill(before, number)
        assert [read_number(frame) for frame in stream] == [0, 5, 50, 119]
        assert stream._session.pid != before
        assert not alive(before)


async def test_indexing_goes_on_after_a_death_of_the_child(big_video: Path) -> None:
    task = asyncio.create_task(index_video(big_video, VideoConfig()))
    while not children():
        await asyncio.sleep(0)
    [first] = children()
    os.kill(first, signal.SIGKILL)
    assert (await task).frame_count == 120
    assert children() == set()


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGSEGV, Reason.DECODE_FAILED), (signal.SIGKILL, Reason.VIDEO_DECODER_KILLED)],
)
async def test_indexing_gives_up_after_two_deaths(
    big_video: Path, number: int, reason: Reason
) -> None:
    task = asyncio.create_task(index_video(big_video, VideoConfig()))
    killed: set[int] = set()
    while not task.done():
        for pid in children() - killed:
            os.kill(pid, number)
            killed.add(pid)
        await asyncio.sleep(0)
    with pytest.raises(ServiceError) as caught:
        await task
    assert caught.value.reason is reason
    assert len(killed) == 2


async def test_indexing_times_out(big_video: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        await index_video(big_video, VideoConfig(probe_timeout_s=0.05))
    assert caught.value.reason is Reason.DECODE_TIMEOUT
    assert children() == set()


async def test_cancelled_indexing_kills_its_process(big_video: Path) -> None:
    task = asyncio.create_task(index_video(big_video, VideoConfig()))
    await asyncio.sleep(0.05)
    assert len(children()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == set()


@pytest.mark.parametrize("wanted", [[3, 2], [-1], [0, 120]])
def test_indices_must_ascend_within_the_video(big_video: Path, wanted: list[int]) -> None:
    with pytest.raises(ServiceError) as caught:
        stream_of(big_video, wanted)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_no_frames_wanted_gives_none(big_video: Path) -> None:
    with stream_of(big_video, []) as stream:
        assert list(stream) == []


def test_environment_and_folder_of_the_child_are_empty(big_video: Path, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-pass-on")
    with stream_of(big_video, list(range(10))) as stream:
        assert stream.poll(30) is not None
        process = Path(f"/proc/{stream._session.pid}")
        assert b"do-not-pass-on" not in (process / "environ").read_bytes()
        limits = (process / "limits").read_text()
        assert "Max core file size        0" in limits
        assert str(VideoConfig().max_memory_bytes) in limits
        # a few standard descriptors, the video, and the copy FFmpeg opened of it
        videos = [fd for fd in (process / "fd").iterdir() if fd.resolve() == big_video]
        assert len(videos) == 2
        assert len(list((process / "fd").iterdir())) <= 8


def test_importing_the_child_does_not_import_torch() -> None:
    script = "import sys, prefill_service.video.decoder.child; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert "av" in modules, done.stderr
    assert not modules & {"torch", "cv2", "grpc", "transformers"}


def test_frames_are_independent_arrays(big_video: Path) -> None:
    with stream_of(big_video, [1, 2]) as stream:
        first, second = list(stream)
    copy = second.copy()
    first[:] = 0
    np.testing.assert_array_equal(second, copy)
