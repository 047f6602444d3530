"""One rule for cut files of all containers, and what is taken of them if that is allowed."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.integrity.structure import Structure, survey_structure
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex, WarningReason
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.sample_videos import H264, make_video, read_number

LIMITS = VideoConfig()
CLUSTER = b"\x1f\x43\xb6\x75"
CUES = b"\x1c\x53\xbb\x6b"
UNKNOWN_SIZE = b"\x01" + b"\xff" * 7
ASF_DATA = bytes.fromhex("3626b2758e66cf11")
ASF_FILE = bytes.fromhex("a1dcab8c47a9cf11")
CLUSTERS = {"container_options": {"cluster_time_limit": "1000"}}
FASTSTART = {"container_options": {"movflags": "faststart"}}
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
VP8 = {"codec": "libvpx", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}}
MPEG2 = {"codec": "mpeg2video", "options": {"g": "10"}, "rate": 25}
LIVE = {"container_options": {"live": "1", "cluster_time_limit": "1000"}}
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
    "mpeg": ("v.mpg", {**MPEG2, "container_format": "mpeg"}),
    "vob": ("v.vob", {**MPEG2, "container_format": "vob"}),
    "wmv": ("v.wmv", {"codec": "wmv2", "options": {"g": "10"}, "size": (320, 240)}),
    "mxf": ("v.mxf", MPEG2),
    "gif": ("v.gif", {"codec": "gif", "options": {}, "pix_fmt": "rgb8"}),
    "apng": ("v.apng", {"codec": "apng", "options": {}, "pix_fmt": "rgb24"}),
    "live_mkv": ("v.mkv", LIVE),
    "live_webm": ("v.webm", {**VP8, **LIVE}),
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
    wanted = [0, 5, index.frame_count - 5]
    assert read(whole, index, wanted) == wanted


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


def in_browsers_form(data: bytes) -> bytes:
    """A live file whose clusters have no size either, as browsers' MediaRecorder writes them."""
    parts = data.split(CLUSTER)
    assert len(parts) > 5
    # The first byte of a size says how many it has.
    bare = [part[9 - part[0].bit_length() :] for part in parts[1:]]
    return (CLUSTER + UNKNOWN_SIZE).join([parts[0], *bare])


def read(path: Path, index: VideoIndex, wanted: list[int]) -> list[int]:
    index.save(path.with_name("index.npz"))
    with FrameStream.open(path, path.with_name("index.npz"), wanted, LIMITS) as stream:
        return [read_number(frame) for frame in stream]


@pytest.mark.parametrize("settings", [VP8, {}], ids=["webm", "mkv"])
def test_a_live_recording_is_taken_and_said_to_be_one(tmp_path: Path, settings: dict) -> None:
    path = make_video(
        tmp_path / "v.webm",
        frames=100,
        container_format="matroska",
        **{"options": H264, **settings, **LIVE},
    )
    data = in_browsers_form(path.read_bytes())
    path.write_bytes(data)
    index = build_index(str(path), LIMITS)
    (warning,) = index.warnings
    assert warning.reason is WarningReason.OPEN_ENDED
    assert f"100 frames up to second {index.duration_s:.3f}" in warning.message
    assert index.duration_s == pytest.approx(10.0, abs=0.01)
    assert read(path, index, [0, 5, 47, 99]) == [0, 5, 47, 99]
    path.write_bytes(data[: data.rindex(CLUSTER)])  # the last clusters never came
    index = build_index(str(path), LIMITS)
    assert [one.reason for one in index.warnings] == [WarningReason.OPEN_ENDED]
    assert 80 < index.frame_count < 100
    path.write_bytes(data[: data.rindex(CLUSTER) + 20])
    with pytest.raises(ServiceError, match="its last element ends at byte") as caught:
        build_index(str(path), LIMITS)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO


def test_frames_of_a_webm_without_cues_are_found(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.webm", frames=100, **{**VP8, **CLUSTERS})
    data = path.read_bytes()
    at = data.rindex(CUES)
    size = len(data) - at
    void = b"\xec\x01" + (size - 9).to_bytes(7, "big")
    path.write_bytes(data[:at] + void + bytes(size - 9))
    index = build_index(str(path), LIMITS)
    assert index.warnings == ()
    assert read(path, index, [3, 60, 99]) == [3, 60, 99]


def test_a_cut_second_part_of_an_avi_is_noticed(tmp_path: Path) -> None:
    """OpenDML: files of more than a gigabyte have several RIFF chunks."""
    path = make_video(tmp_path / "v.avi", "mpeg4", 100, options={"g": "10"})
    data = path.read_bytes()
    at = data.index(b"movi") - 8
    (length,) = struct.unpack("<I", data[at + 4 : at + 8])
    movi = data[at : at + 8 + length]
    more = b"RIFF" + struct.pack("<I", 4 + len(movi)) + b"AVIX" + movi
    path.write_bytes(data + more)
    with path.open("rb") as file:
        assert survey_structure(file) == Structure()
    path.write_bytes(data + more[: len(more) // 2])
    with pytest.raises(ServiceError, match=f"RIFF chunk ends at byte {len(data + more)}, the file"):
        build_index(str(path), LIMITS)


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_an_avi_that_was_never_finished_is_judged_by_its_last_chunk(
    tmp_path: Path, size: bytes
) -> None:
    path = make_video(tmp_path / "v.avi", "mpeg4", 100, options={"g": "10"})
    data = bytearray(path.read_bytes())
    data[4:8] = size
    movi = data.index(b"movi")
    data[movi - 4 : movi] = size
    del data[data.index(b"idx1") :]
    path.write_bytes(bytes(data))
    index = build_index(str(path), LIMITS)
    assert (index.frame_count, index.warnings[0].reason) == (100, WarningReason.OPEN_ENDED)
    path.write_bytes(bytes(data[:-10]))
    with pytest.raises(ServiceError, match="last chunk ends at byte"):
        build_index(str(path), LIMITS)


@pytest.mark.parametrize("live", [False, True], ids=["interrupted", "broadcast"])
def test_a_wmv_that_does_not_say_its_size_is_judged_by_its_packets(
    tmp_path: Path, live: bool
) -> None:
    path = make_video(tmp_path / "v.wmv", "wmv2", 100, options={"g": "10"})
    data = bytearray(path.read_bytes())
    at = data.index(ASF_DATA)
    (length,) = struct.unpack("<Q", data[at + 16 : at + 24])
    del data[at + length :]
    data[at + 16 : at + 24] = bytes(8)
    if live:
        data[data.index(ASF_FILE) + 88] |= 1
    path.write_bytes(bytes(data))
    index = build_index(str(path), LIMITS)
    assert index.frame_count == 100
    assert WarningReason.OPEN_ENDED in [warning.reason for warning in index.warnings]
    path.write_bytes(bytes(data[:-100]))
    with pytest.raises(ServiceError, match="last packet ends at byte"):
        build_index(str(path), LIMITS)


@pytest.mark.parametrize("name", ["gif", "apng"])
def test_a_picture_without_its_end_mark_is_said_to_be_open(tmp_path: Path, name: str) -> None:
    file, arguments = FILES[name]
    path = make_video(tmp_path / file, frames=20, **arguments)
    data = path.read_bytes()
    path.write_bytes(data[: -1 if name == "gif" else -12])
    index = build_index(str(path), LIMITS)
    assert index.frame_count == 20
    assert index.warnings[0].reason is WarningReason.OPEN_ENDED


def test_dv_is_cut_within_a_frame_only(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.dv", "dvvideo", 4, options={}, size=(720, 576), rate=25)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    index = build_index(str(path), LIMITS)
    assert index.frame_count == 2
    expected = {WarningReason.PIXEL_ASPECT, WarningReason.INTERLACED}
    assert {one.reason for one in index.warnings} == expected
    path.write_bytes(data[: len(data) // 2 + 1000])
    with pytest.raises(ServiceError, match="last frame ends at byte"):
        build_index(str(path), LIMITS)


def test_a_quicktime_file_of_the_old_form_is_judged_too(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mov", frames=100)
    data = path.read_bytes()
    (length,) = struct.unpack(">I", data[:4])
    path.write_bytes(data[length : len(data) // 2])  # without its ftyp box, and cut
    with pytest.raises(ServiceError, match="nothing of it can be read") as caught:
        build_index(str(path), LIMITS)
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
