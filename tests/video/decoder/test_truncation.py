"""One rule for cut files of all containers, and what is taken of them if that is allowed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import WarningReason
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.sample_videos import H264, make_video, read_number

LIMITS = VideoConfig()
FASTSTART = {"container_options": {"movflags": "faststart"}}
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
VP8 = {"codec": "libvpx", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}}
# name -> file and arguments of make_video
FILES: dict[str, tuple[str, dict]] = {
    "mp4": ("v.mp4", FASTSTART),
    "fragmented_mp4": ("v.mp4", FRAGMENTS),
    "mkv": ("v.mkv", {}),
    "webm": ("v.webm", VP8),
    "avi": ("v.avi", {"codec": "mpeg4", "options": {"g": "10"}}),
    "ts": ("v.ts", {}),
    "m2ts": ("v.m2ts", {}),
    "flv": ("v.flv", {}),
    "ogg": ("v.ogg", {**VP8, "container_format": "ogg"}),
}


@pytest.fixture(params=FILES)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file, arguments = FILES[request.param]
    return make_video(tmp_path / file, frames=100, **{"options": H264, **arguments})


def test_a_whole_file_is_not_cut(whole: Path) -> None:
    index = build_index(str(whole), LIMITS)
    assert index.frame_count == 100
    assert WarningReason.TRUNCATED not in {warning.reason for warning in index.warnings}


@pytest.mark.parametrize("share", [0.5, 0.83])
def test_a_cut_file_is_refused_unless_allowed(whole: Path, share: float) -> None:
    data = whole.read_bytes()
    length = int(len(data) * share)
    while min(length % 188, length % 192) < 10:  # within a packet of a transport stream
        length += 1
    whole.write_bytes(data[:length])
    with pytest.raises(ServiceError, match="allow_truncated") as caught:
        build_index(str(whole), LIMITS)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO
    index = build_index(str(whole), LIMITS, allow_truncated=True)
    assert 10 < index.frame_count < 100
    warning = index.warnings[0]
    assert warning.reason is WarningReason.TRUNCATED
    assert f"{index.frame_count} frames up to second {index.duration_s:.3f}" in warning.message
    index.save(whole.with_name("index.npz"))
    wanted = [0, 5, index.frame_count - 5]
    with FrameStream.open(whole, whole.with_name("index.npz"), wanted, LIMITS) as stream:
        assert [read_number(frame) for frame in stream] == wanted


def test_a_transport_stream_that_ends_with_a_packet_is_a_recordings_end(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.ts", frames=100)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 // 188 * 188])
    assert build_index(str(path), LIMITS).warnings == ()


def test_junk_behind_the_last_packet_is_no_packet(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.ts", frames=100)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert build_index(str(path), LIMITS).frame_count == 100


def test_an_mp4_without_its_table_cannot_be_read_at_all(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mp4", frames=100)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 40])
    with pytest.raises(ServiceError, match="nothing of it can be read") as caught:
        build_index(str(path), LIMITS, allow_truncated=True)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO


async def test_a_cut_video_is_only_for_those_who_allow_it(
    store: VideoStore, tmp_path: Path
) -> None:
    path = make_video(tmp_path / "v.ts", frames=100)
    data = path.read_bytes()[:-100]
    arguments = ("v.ts", len(data), hashlib.sha256(data).hexdigest())

    async def upload(allow: bool) -> str:
        video = await store.create_upload(*arguments, allow_truncated=allow)
        if video.state is VideoState.UPLOADING:
            await store.append_chunk(video.video_id, 0, data)
        return (await store.finish_upload(video.video_id)).video_id

    with pytest.raises(ServiceError) as caught:
        await upload(False)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO
    allowed = await upload(True)
    assert await upload(True) == allowed
    with pytest.raises(ServiceError) as caught:
        await upload(False)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO
    assert (await store.get_video(allowed)).state is VideoState.READY
