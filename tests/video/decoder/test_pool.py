"""The decoder pool: a process serves once, is replaced when it is quiet, ends with its owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import LEAST_DECODER_BYTES, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.process import DecoderProcess
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.indexer import index_video
from tests.video.processes import alive, children, wait_until
from tests.video.sample_videos import make_video

LIMITS = VideoConfig()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Frames larger than a pipe, so that who decodes them waits to be read."""
    return make_video(tmp_path / "v.mp4", "mpeg4", 24, size=(960, 540))


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    """A pool in which one process waits."""
    started = start_pool(1)
    assert wait_until(lambda: started._waiting)
    yield started
    started.close()
    assert wait_until(lambda: not children())


def start_pool(count: int, **seconds: float) -> DecoderPool:
    pool = DecoderPool(count, **seconds)
    pool.start()
    return pool


async def test_the_process_that_waits_decodes(video: Path, pool: DecoderPool) -> None:
    [waiting] = children()
    index = await index_video(video, LIMITS, pool)
    assert not alive(waiting)  # it had one file to look at
    index.save(video.with_name("index.npz"))
    with FrameStream.open(video, video.with_name("index.npz"), range(24), LIMITS) as stream:
        cold = list(stream)
    assert wait_until(lambda: pool._waiting)  # another one has taken its place
    [waiting] = children()
    with FrameStream.open(
        video, video.with_name("index.npz"), range(24), LIMITS, pool=pool
    ) as stream:
        assert stream._session.pid == waiting
        found = list(stream)
    assert np.array_equal(found, cold)


async def test_no_process_is_started_beside_one_at_work(video: Path) -> None:
    pool = start_pool(1, quiet_s=0.0)
    (await index_video(video, LIMITS, pool)).save(video.with_name("index.npz"))
    assert wait_until(lambda: pool._waiting)
    arguments = (video, video.with_name("index.npz"), range(24), LIMITS)
    with FrameStream.open(*arguments, pool=pool), FrameStream.open(*arguments, pool=pool):
        assert wait_until(lambda: len(children()) == 2)  # one of them cold
        assert not wait_until(lambda: len(children()) != 2, timeout_s=0.5)
    assert wait_until(lambda: len(children()) == 1)
    pool.close()


async def test_another_process_is_started_beside_one_that_takes_long(video: Path) -> None:
    (await index_video(video, LIMITS)).save(video.with_name("index.npz"))
    pool = start_pool(1, long_s=0.2)
    arguments = (video, video.with_name("index.npz"), range(24), LIMITS)
    with FrameStream.open(*arguments, pool=pool):
        assert wait_until(lambda: len(children()) == 2)
    pool.close()


async def test_a_process_that_died_waiting_is_not_used(video: Path, pool: DecoderPool) -> None:
    [waiting] = children()
    os.kill(waiting, signal.SIGKILL)
    assert wait_until(lambda: not alive(waiting))
    assert (await index_video(video, LIMITS, pool)).frame_count == 24


async def test_a_missing_file_costs_no_process(tmp_path: Path, pool: DecoderPool) -> None:
    [waiting] = children()
    with pytest.raises(ServiceError) as caught:
        await index_video(tmp_path / "nothing.mp4", LIMITS, pool)
    assert caught.value.reason is Reason.NOT_A_VIDEO
    assert children() == {waiting}


async def test_limits_are_those_of_the_request(video: Path, pool: DecoderPool) -> None:
    small = VideoConfig(max_memory_bytes=LEAST_DECODER_BYTES, max_frames=10)
    with pytest.raises(ServiceError) as caught:
        await index_video(video, small, pool)
    assert caught.value.metadata["limit"] == "max_frames"


async def test_an_empty_pool_starts_each_process_when_needed(video: Path) -> None:
    pool = start_pool(0)
    assert (await index_video(video, LIMITS, pool)).frame_count == 24
    assert not children()
    pool.close()
    pool.close()


def test_a_start_that_failed_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = [OSError(11, "Resource temporarily unavailable")]

    start_process = DecoderProcess.start

    def start() -> DecoderProcess:
        if left:
            raise left.pop()
        return start_process()

    # No kernel refuses a process just when it is asked to.
    monkeypatch.setattr(DecoderProcess, "start", start)
    pool = start_pool(1, quiet_s=0.05)
    assert wait_until(lambda: len(children()) == 1)
    assert "Resource temporarily unavailable" in caplog.text
    pool.close()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_a_process_that_waits_dies_with_its_parent(end: str) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from prefill_service.video.decoder.pool import DecoderPool
pool = DecoderPool(1)
pool.start()
while not pool._waiting:
    time.sleep(0.01)
print(pool._waiting[0].pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    assert wait_until(lambda: not alive(pid))
