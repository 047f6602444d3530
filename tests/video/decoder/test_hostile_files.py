"""The hostile corpus: each file gets its precise reason, quickly, and no other file is read."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder import process, session
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.session import DecoderRequest, DecoderSession
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video
from tests.video.sample_videos import H264, damage_frames, make_audio, make_video

LIMITS = VideoConfig()
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"


def text_file(folder: Path, samples: dict[str, Path]) -> Path:
    return write(folder / "v.mp4", b"This is a text, not a video.\n" * 200)


def empty_file(folder: Path, samples: dict[str, Path]) -> Path:
    return write(folder / "v.mp4", b"")


def folder_itself(folder: Path, samples: dict[str, Path]) -> Path:
    return folder


def fifo(folder: Path, samples: dict[str, Path]) -> Path:
    os.mkfifo(folder / "v.mp4")
    return folder / "v.mp4"


def missing(folder: Path, samples: dict[str, Path]) -> Path:
    return folder / "nothing.mp4"


def image(folder: Path, samples: dict[str, Path]) -> Path:
    cv2.imwrite(str(folder / "v.png"), np.zeros((64, 64, 3), np.uint8))
    return folder / "v.png"


def secret(folder: Path, samples: dict[str, Path]) -> str:
    (folder / "secret.ts").write_bytes(samples["h264_ts"].read_bytes())
    return "secret.ts"


def playlist_m3u8(folder: Path, samples: dict[str, Path]) -> Path:
    return write(folder / "v.m3u8", PLAYLIST.format(secret(folder, samples)).encode())


def playlist_mp4(folder: Path, samples: dict[str, Path]) -> Path:
    return write(folder / "v.mp4", PLAYLIST.format(secret(folder, samples)).encode())


def ffconcat(folder: Path, samples: dict[str, Path]) -> Path:
    text = f"ffconcat version 1.0\nfile {secret(folder, samples)}\n"
    return write(folder / "v.mp4", text.encode())


def cut_at_end(folder: Path, samples: dict[str, Path]) -> Path:
    data = samples["h264_b_frames"].read_bytes()
    assert data.index(b"mdat") < data.index(b"moov")
    return write(folder / "v.mp4", data[: data.index(b"moov") - 40])


def cut_faststart(folder: Path, samples: dict[str, Path]) -> Path:
    whole = make_video(folder / "w.mp4", container_options={"movflags": "faststart"})
    data = whole.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    return write(folder / "v.mp4", data[: len(data) * 3 // 4])


def mp4_with_samples_beyond_its_end(folder: Path, samples: dict[str, Path]) -> Path:
    """Cut faststart, with the size of mdat mended: only the sample table tells."""
    data = bytearray(cut_faststart(folder, samples).read_bytes())
    at = data.index(b"mdat") - 4
    data[at : at + 4] = (len(data) - at).to_bytes(4, "big")
    return write(folder / "v.mp4", bytes(data))


def cut_mkv(folder: Path, samples: dict[str, Path]) -> Path:
    data = samples["h264_vfr_mkv"].read_bytes()
    return write(folder / "v.mkv", data[: len(data) * 3 // 4])


def cut_avi(folder: Path, samples: dict[str, Path]) -> Path:
    data = samples["mpeg4_avi"].read_bytes()
    return write(folder / "v.avi", data[: len(data) * 3 // 4])


def audio_only(folder: Path, samples: dict[str, Path]) -> Path:
    return make_audio(folder / "v.mp4")


def audio_with_cover(folder: Path, samples: dict[str, Path]) -> Path:
    return make_audio(folder / "v.mp4", cover=True)


def no_frames(folder: Path, samples: dict[str, Path]) -> Path:
    """The tables of an MP4 say that its one video track has no samples."""
    options = {"movflags": "frag_keyframe+empty_moov"}
    data = make_video(folder / "w.mp4", container_options=options).read_bytes()
    return write(folder / "v.mp4", data[: data.index(b"moof") - 4])


def garbage_frames(folder: Path, samples: dict[str, Path]) -> Path:
    data = bytearray(samples["mpeg4_b_frames"].read_bytes())
    begin = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[begin:end] = bytes(end - begin)
    return write(folder / "v.mp4", bytes(data))


def odd_codec(folder: Path, samples: dict[str, Path]) -> Path:
    return make_video(folder / "v.avi", "msvideo1", 5, pix_fmt="rgb555le", options={})


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


CORPUS = [
    (text_file, Reason.NOT_A_VIDEO),
    (empty_file, Reason.NOT_A_VIDEO),
    (folder_itself, Reason.NOT_A_VIDEO),
    (fifo, Reason.NOT_A_VIDEO),
    (missing, Reason.NOT_A_VIDEO),
    (image, Reason.FORMAT_NOT_ALLOWED),
    (playlist_m3u8, Reason.FORMAT_NOT_ALLOWED),
    (playlist_mp4, Reason.FORMAT_NOT_ALLOWED),
    (ffconcat, Reason.FORMAT_NOT_ALLOWED),
    (odd_codec, Reason.FORMAT_NOT_ALLOWED),
    (cut_at_end, Reason.TRUNCATED_VIDEO),
    (cut_faststart, Reason.TRUNCATED_VIDEO),
    (mp4_with_samples_beyond_its_end, Reason.TRUNCATED_VIDEO),
    (cut_mkv, Reason.TRUNCATED_VIDEO),
    (cut_avi, Reason.TRUNCATED_VIDEO),
    (audio_only, Reason.NO_VIDEO_STREAM),
    (audio_with_cover, Reason.NO_VIDEO_STREAM),
    (no_frames, Reason.NO_FRAMES),
    (garbage_frames, Reason.NO_FRAMES),
]


@pytest.mark.parametrize(("make", "reason"), CORPUS, ids=[make.__name__ for make, _ in CORPUS])
async def test_indexing_refuses(make, reason, samples: dict[str, Path], tmp_path: Path) -> None:
    path = make(tmp_path, samples)
    with pytest.raises(ServiceError) as caught:
        await index_video(path, LIMITS)
    assert caught.value.reason is reason, caught.value
    assert caught.value.message


# Files that a reader must refuse although an index (of another video) says they are fine.
OPENED_ANYWAY = [
    text_file,
    image,
    playlist_m3u8,
    playlist_mp4,
    ffconcat,
    audio_only,
    fifo,
    folder_itself,
    empty_file,
    garbage_frames,
]


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
@pytest.mark.parametrize("make", OPENED_ANYWAY, ids=[make.__name__ for make in OPENED_ANYWAY])
async def test_frame_stream_refuses(
    make, reader: str, samples: dict[str, Path], sample_index: Path, tmp_path: Path
) -> None:
    path = make(tmp_path, samples)
    accepted = {reason for made, reason in CORPUS if made is make} | {Reason.DECODE_FAILED}
    with pytest.raises(ServiceError) as caught:
        list(FrameStream.open(path, sample_index, [0, 5], VideoConfig(reader=reader)))
    assert caught.value.reason in accepted, caught.value


@pytest.fixture
async def sample_index(samples: dict[str, Path], tmp_path: Path) -> Path:
    index = await index_video(samples["h264_b_frames"], LIMITS)
    index.save(tmp_path / "index.npz")
    return tmp_path / "index.npz"


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
@pytest.mark.parametrize("make", [playlist_m3u8, playlist_mp4, ffconcat])
async def test_no_other_file_is_read(
    make, reader: str, samples: dict[str, Path], sample_index: Path, tmp_path: Path
) -> None:
    path = make(tmp_path, samples)
    other = tmp_path / "secret.ts"
    os.utime(other, ns=(1, time.time_ns()))  # relatime moves an old atime at the first read
    with pytest.raises(ServiceError):
        await index_video(path, LIMITS)
    with pytest.raises(ServiceError):
        list(FrameStream.open(path, sample_index, [0], VideoConfig(reader=reader)))
    assert other.stat().st_atime_ns == 1
    other.read_bytes()
    if other.stat().st_atime_ns == 1:
        pytest.skip("this file system keeps no access times: the check above proves nothing")


async def test_bomb_is_refused_before_a_frame_is_decoded(tmp_path: Path) -> None:
    bomb = make_bomb(tmp_path / "bomb.mp4")
    assert bomb.stat().st_size < 1 << 20
    started = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        await index_video(bomb, LIMITS)
    assert time.monotonic() - started < 10
    assert caught.value.reason is Reason.VIDEO_LIMIT_EXCEEDED
    assert caught.value.metadata == {
        "limit": "max_frame_pixels",
        "value": str(8192 * 8192),
        "maximum": str(LIMITS.max_frame_pixels),
    }


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
async def test_bomb_is_refused_by_the_readers(
    reader: str, sample_index: Path, tmp_path: Path
) -> None:
    bomb = make_bomb(tmp_path / "bomb.mp4")
    with pytest.raises(ServiceError) as caught:
        list(FrameStream.open(bomb, sample_index, [0], VideoConfig(reader=reader)))
    assert caught.value.reason is Reason.VIDEO_LIMIT_EXCEEDED


@pytest.mark.parametrize("side", [16384, 65535])
def test_a_size_in_a_header_is_refused_before_a_frame_is_read(tmp_path: Path, side: int) -> None:
    settings = {"size": (300, 300), "options": {}}
    path = make_video(tmp_path / "v.mkv", "rawvideo", 2, **settings)
    data = path.read_bytes()
    for name in (b"\xb0\x82", b"\xba\x82"):  # PixelWidth, PixelHeight
        assert data.count(name + (300).to_bytes(2, "big")) == 1
        data = data.replace(name + (300).to_bytes(2, "big"), name + side.to_bytes(2, "big"))
    path.write_bytes(data)
    with pytest.raises(ServiceError) as caught:
        build_index(str(path), LIMITS)
    assert caught.value.reason is Reason.VIDEO_LIMIT_EXCEEDED
    assert f"{side}x{side} = {side * side} pixels" in caught.value.message
    assert f"max_frame_pixels is {LIMITS.max_frame_pixels}" in caught.value.message


async def test_bomb_in_disguise_is_refused(samples: dict[str, Path], tmp_path: Path) -> None:
    """A raw stream whose first parameter set is small and whose second is huge."""
    small = make_video(tmp_path / "small.ts", frames=100).read_bytes()
    big = make_bomb(tmp_path / "big.ts").read_bytes()
    path = write(tmp_path / "both.ts", small + big)
    limits = VideoConfig(max_memory_bytes=1 << 30)
    try:
        index = await index_video(path, limits)
    except ServiceError as error:
        assert error.reason is Reason.VIDEO_LIMIT_EXCEEDED  # noqa: PT017
    else:
        assert index.width == 96
        assert index.frame_count == 100


def make_bomb(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30, options={"preset": "ultrafast"})
        stream.width = stream.height = 8192
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        frame = av.VideoFrame(8192, 8192, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(2):
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("limits", "limit", "value"),
    [
        (VideoConfig(max_frame_pixels=96 * 64 - 1), "max_frame_pixels", 96 * 64),
        (VideoConfig(max_frames=39), "max_frames", 40),
        (VideoConfig(max_duration_s=3.9), "max_duration_s", 4.0),
    ],
)
async def test_limits_name_themselves(
    limits: VideoConfig, limit: str, value: float, samples: dict[str, Path]
) -> None:
    with pytest.raises(ServiceError) as caught:
        await index_video(samples["h264_b_frames"], limits)
    assert caught.value.reason is Reason.VIDEO_LIMIT_EXCEEDED
    assert caught.value.metadata["limit"] == limit
    assert float(caught.value.metadata["value"]) == value
    assert caught.value.metadata["maximum"] == str(getattr(limits, limit))


async def test_video_at_its_limits_is_accepted(samples: dict[str, Path]) -> None:
    limits = VideoConfig(max_frame_pixels=96 * 64, max_frames=40, max_duration_s=4.0)
    assert (await index_video(samples["h264_b_frames"], limits)).frame_count == 40


async def test_memory_limit_is_named(tmp_path: Path) -> None:
    """FFmpeg calls a frame it has no memory for damaged, or leaves it out: we must not."""
    path = make_bomb(tmp_path / "big.mp4")
    pixels = 8192 * 8192
    index = await index_video(path, VideoConfig(max_frame_pixels=pixels))
    assert index.frame_count == 2
    index.save(tmp_path / "index.npz")
    limits = VideoConfig(max_frame_pixels=pixels, max_memory_bytes=400 << 20)
    with pytest.raises(ServiceError) as probing:
        await index_video(path, limits)
    with pytest.raises(ServiceError) as reading:
        list(FrameStream.open(path, tmp_path / "index.npz", [0, 1], limits))
    for error in (probing.value, reading.value):
        assert error.reason is Reason.VIDEO_LIMIT_EXCEEDED
        assert error.metadata["limit"] == "max_memory_bytes"


async def test_damaged_frame_is_named_by_both_readers(tmp_path: Path) -> None:
    """Frames whose bytes are gone are not silently replaced by their neighbours."""
    options = {**H264, "g": "10", "bf": "0", "sc_threshold": "0"}
    path = make_video(tmp_path / "v.mp4", frames=200, options=options)
    index = await index_video(path, LIMITS)
    index.save(tmp_path / "index.npz")
    damage_frames(path, 100, 109)
    for reader in ("pyav", "opencv"):
        limits = VideoConfig(reader=reader)
        with FrameStream.open(path, tmp_path / "index.npz", [95, 105, 150], limits) as stream:
            assert next(iter(stream)) is not None
            with pytest.raises(ServiceError) as caught:
                list(stream)
        assert caught.value.reason is Reason.DECODE_FAILED
        assert caught.value.metadata == {"frame_index": "105", "time_s": "10.500"}


def test_the_child_can_open_nothing_but_its_video(samples: dict[str, Path]) -> None:
    """What a decoder with a hole could do: read a file, write one, connect."""
    script = """
import os, socket, sys
from pathlib import Path
from prefill_service.video.decoder.sandbox.landlock import confine_files
from prefill_service.video.decoder.sandbox.resource_limits import ResourceLimits, confine_resources
fd = os.open(sys.argv[1], os.O_RDONLY)
confine_resources(ResourceLimits(1 << 30, 10))
if not confine_files(fd, [Path(os.__file__).parent]):
    sys.exit(77)
def refused(action):
    try:
        action()
    except PermissionError:
        return True
    return False
assert open(f"/proc/self/fd/{fd}", "rb").read(4)
assert refused(lambda: open("/etc/passwd"))
assert refused(lambda: open(sys.argv[1] + ".new", "w"))
assert refused(lambda: os.listdir("/"))
assert refused(lambda: socket.create_connection(("127.0.0.1", 9)))
"""
    python = subprocess.run(
        ["python", "-c", script, str(samples["h264_b_frames"])], capture_output=True, text=True
    )
    if python.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert python.returncode == 0, python.stderr


def test_the_child_can_reach_no_network_and_no_process() -> None:
    """What a decoder with a hole could do by system calls. Threads are allowed, and its own end."""
    module = "tests.video.decoder.confined_child"
    python = subprocess.run(["python", "-m", module], capture_output=True, text=True)
    if python.returncode == 77:
        pytest.skip("this kernel or container allows no seccomp filter")
    assert python.returncode == -signal.SIGABRT, python.stderr


async def test_index_is_sound_for_a_video_after_all_that(samples: dict[str, Path]) -> None:
    assert isinstance(await index_video(samples["h264_b_frames"], LIMITS), VideoIndex)


def test_a_child_that_hangs_up_and_stays_is_killed(
    samples: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that its file controls would do: no output any more, and no end."""
    monkeypatch.setattr(process, "_CHILD_MODULE", "tests.video.decoder.silent_child")
    monkeypatch.setattr(session, "_EXIT_S", 0.2)
    request = DecoderRequest(header={}, payload=b"", cpu_s=9, max_answer_bytes=9)
    opened = DecoderSession.open(samples["h264_b_frames"], request, VideoConfig())
    with opened, pytest.raises(ServiceError, match="killed by SIGKILL") as error:
        opened.receive(20)
    assert error.value.reason is Reason.DECODE_FAILED
