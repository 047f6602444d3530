"""Decoder processes started ahead: taken once, replaced when it is quiet, gone with their owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder import pool as module
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.process import DecoderProcess
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.probe import probe_video
from tests.video.make import make_video
from tests.video.processes import alive, children, wait_until

LIMITS = VideoConfig()


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Frames larger than a pipe, so that who decodes them waits to be read."""
    return make_video(tmp_path / "v.mp4", "mpeg4", 24, size=(960, 540))


@pytest.fixture
def spares() -> Iterator[DecoderPool]:
    """One that waits."""
    found = DecoderPool(1)
    assert wait_until(lambda: found._waiting)
    yield found
    found.close()
    assert wait_until(lambda: not children())


async def test_the_one_that_waits_decodes(video: Path, spares: DecoderPool) -> None:
    [waiting] = children()
    index = await probe_video(video, LIMITS, spares)
    assert not alive(waiting)  # it had one file to look at
    index.save(video.with_name("index.npz"))
    with FrameStream(video, video.with_name("index.npz"), range(24), LIMITS) as stream:
        cold = list(stream)
    assert wait_until(lambda: spares._waiting)  # another one has taken its place
    [waiting] = children()
    with FrameStream(
        video, video.with_name("index.npz"), range(24), LIMITS, spares=spares
    ) as stream:
        assert stream._child.pid == waiting
        found = list(stream)
    assert np.array_equal(found, cold)


async def test_none_is_started_beside_one_at_work(video: Path) -> None:
    spares = DecoderPool(1, quiet_s=0.0)
    (await probe_video(video, LIMITS, spares)).save(video.with_name("index.npz"))
    assert wait_until(lambda: spares._waiting)
    arguments = (video, video.with_name("index.npz"), range(24), LIMITS)
    with FrameStream(*arguments, spares=spares), FrameStream(*arguments, spares=spares):
        assert wait_until(lambda: len(children()) == 2)  # one of them cold
        assert not wait_until(lambda: len(children()) != 2, timeout_s=0.5)
    assert wait_until(lambda: len(children()) == 1)
    spares.close()


async def test_of_one_that_takes_long_nobody_waits_for_the_end(video: Path) -> None:
    (await probe_video(video, LIMITS)).save(video.with_name("index.npz"))
    spares = DecoderPool(1, long_s=0.2)
    arguments = (video, video.with_name("index.npz"), range(24), LIMITS)
    with FrameStream(*arguments, spares=spares):
        assert wait_until(lambda: len(children()) == 2)
    spares.close()


async def test_one_that_died_waiting_is_not_used(video: Path, spares: DecoderPool) -> None:
    [waiting] = children()
    os.kill(waiting, signal.SIGKILL)
    assert wait_until(lambda: not alive(waiting))
    assert (await probe_video(video, LIMITS, spares)).frame_count == 24


async def test_a_file_that_is_none_costs_none(tmp_path: Path, spares: DecoderPool) -> None:
    [waiting] = children()
    with pytest.raises(ServiceError) as caught:
        await probe_video(tmp_path / "nothing.mp4", LIMITS, spares)
    assert caught.value.reason is Reason.NOT_A_VIDEO
    assert children() == {waiting}


async def test_limits_are_those_of_the_request(video: Path, spares: DecoderPool) -> None:
    small = VideoConfig(max_memory_bytes=200 << 20, max_frames=10)
    with pytest.raises(ServiceError) as caught:
        await probe_video(video, small, spares)
    assert caught.value.metadata["limit"] == "max_frames"


async def test_without_spares_each_is_started_when_needed(video: Path) -> None:
    spares = DecoderPool(0)
    assert (await probe_video(video, LIMITS, spares)).frame_count == 24
    assert not children()
    spares.close()
    spares.close()


def test_one_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = [OSError(11, "Resource temporarily unavailable")]

    def start() -> DecoderProcess:
        if left:
            raise left.pop()
        return DecoderProcess()

    # No kernel refuses a process just when it is asked to.
    monkeypatch.setattr(module, "DecoderProcess", start)
    spares = DecoderPool(1, quiet_s=0.05)
    assert wait_until(lambda: len(children()) == 1)
    assert "Resource temporarily unavailable" in caplog.text
    spares.close()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_one_that_waits_dies_with_its_parent(end: str) -> None:
    script = f"""
import os, signal, time
from pathlib import Path
from prefill_service.video.decoder.pool import DecoderSpares
spares = DecoderSpares(1)
while not spares._waiting:
    time.sleep(0.01)
print(spares._waiting[0].pid, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    pid = int(done.stdout)
    assert wait_until(lambda: not alive(pid))
