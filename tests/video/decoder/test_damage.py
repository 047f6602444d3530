"""Files damaged in the middle: what is missing is said, and a lost rest is not passed over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.integrity.damage import describe_damage, says_damaged
from prefill_service.video.decoder.integrity.transport_stream import (
    TransportStream,
    survey_transport_stream,
)
from prefill_service.video.index import VideoIndex, WarningReason
from tests.video.sample_videos import H264, damage_frames, make_video

LIMITS = VideoConfig()
FRAMES = 100
VP8 = {"codec": "libvpx", "options": {"g": "10", "deadline": "realtime", "cpu-used": "8"}}
# Clusters or fragments of a second: there is something to go on with behind the damage.
CLUSTERS = {"container_options": {"cluster_time_limit": "1000"}}
FRAGMENTS = {"container_options": {"movflags": "frag_keyframe+empty_moov"}}
MPEG2 = {"codec": "mpeg2video", "options": {"g": "10"}}
LARGE = {"size": (320, 240)}  # so that a frame is more than a pack
READ_ON: dict[str, tuple[str, dict]] = {
    "mkv": ("v.mkv", CLUSTERS),
    "webm": ("v.webm", {**VP8, **CLUSTERS}),
    "ts": ("v.ts", {}),
    "m2ts": ("v.m2ts", {}),
    "flv": ("v.flv", {}),
    "ogg": ("v.ogg", {**VP8, "container_format": "ogg"}),
    "mxf": ("v.mxf", {**MPEG2, "rate": 25}),
    "mpeg": ("v.mpg", {**MPEG2, **LARGE, "rate": 25, "container_format": "mpeg"}),
    "vob": ("v.vob", {**MPEG2, **LARGE, "rate": 25, "container_format": "vob"}),
}
FILLS: dict[str, Callable[[int], bytes]] = {
    "zeros": bytes,
    "ones": lambda size: b"\xff" * size,
    "noise": lambda size: np.random.default_rng(1).bytes(size),
}


def make_damaged(path: Path, where: tuple[float, float], fill: str, **settings: object) -> Path:
    """A video whose bytes between two parts of the file are overwritten."""
    make_video(path, frames=FRAMES, **{"options": H264, **settings})
    data = bytearray(path.read_bytes())
    start, stop = (int(len(data) * part) for part in where)
    data[start:stop] = FILLS[fill](stop - start)
    path.write_bytes(bytes(data))
    return path


def named(index: VideoIndex, reason: WarningReason) -> list[str]:
    return [warning.message for warning in index.warnings if warning.reason is reason]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", READ_ON)
def test_frames_behind_the_damage_are_read_and_the_gap_is_said(
    tmp_path: Path, kind: str, fill: str
) -> None:
    name, settings = READ_ON[kind]
    whole = make_video(tmp_path / f"whole_{name}", frames=FRAMES, **{"options": H264, **settings})
    assert not named(build_index(str(whole), LIMITS), WarningReason.DAMAGED)
    path = make_damaged(tmp_path / name, (0.5, 0.65), fill, **settings)
    index = build_index(str(path), LIMITS)
    assert FRAMES // 2 < index.frame_count < FRAMES - 5
    message = named(index, WarningReason.DAMAGED)[0]  # some packets behind it may be damaged too
    widest = int(np.diff(index.times_s).argmax())
    gap = f"from second {index.times_s[widest]:.3f} to {index.times_s[widest + 1]:.3f}"
    assert gap in message


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize(
    ("name", "settings", "where"),
    [
        ("v.mkv", {}, (0.5, 0.95)),
        ("v.webm", VP8, (0.5, 0.95)),
        ("fragments.mp4", FRAGMENTS, (0.5, 0.55)),
        ("rest.mp4", FRAGMENTS, (0.3, 0.97)),
        ("v.gif", {"codec": "gif", "pix_fmt": "rgb8", "options": {}}, (0.5, 0.55)),
        ("v.apng", {"codec": "apng", "pix_fmt": "rgb24", "options": {}}, (0.5, 0.55)),
    ],
)
def test_a_lost_rest_is_refused_unless_allowed(
    tmp_path: Path, name: str, settings: dict, where: tuple[float, float], fill: str
) -> None:
    path = make_damaged(tmp_path / name, where, fill, **settings)
    size = path.stat().st_size
    with pytest.raises(ServiceError, match=r"damaged: .*allow_truncated") as caught:
        build_index(str(path), LIMITS)
    assert caught.value.reason is Reason.TRUNCATED_VIDEO
    assert str(size) in caught.value.message or "more fragments follow" in caught.value.message
    index = build_index(str(path), LIMITS, allow_truncated=True)
    assert 10 < index.frame_count < FRAMES * 0.6
    warning = index.warnings[0]
    assert warning.reason is WarningReason.TRUNCATED
    assert f"up to second {index.duration_s:.3f}" in warning.message


@pytest.mark.parametrize("fill", FILLS)
def test_avi_has_no_times_so_the_place_is_said(tmp_path: Path, fill: str) -> None:
    path = make_damaged(tmp_path / "v.avi", (0.6, 0.7), fill, codec="mpeg4", options={"g": "10"})
    index = build_index(str(path), LIMITS)
    assert 60 < index.frame_count < 95
    message = named(index, WarningReason.DAMAGED)[0]
    with av.open(str(path)) as file:
        starts = [packet.pos for packet in file.demux(video=0) if packet.size]
    before = sum(start < 0.6 * path.stat().st_size for start in starts)
    begin, end = (float(part) for part in re.findall(r"\d+\.\d{3}", message))
    assert before / 10 - 0.25 < begin < end < before / 10 + 0.05


def test_frames_of_dv_that_are_none_are_said(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.dv", "dvvideo", 12, options={}, size=(720, 576), rate=25)
    assert not named(build_index(str(path), LIMITS), WarningReason.DAMAGED)
    size = path.stat().st_size // 12
    data = path.read_bytes()
    noise = np.random.default_rng(1).bytes(2 * size)
    path.write_bytes(data[: 5 * size] + noise + data[7 * size :])
    assert named(build_index(str(path), LIMITS), WarningReason.DAMAGED)


@pytest.mark.parametrize("fill", ["removed", *FILLS])
@pytest.mark.parametrize("count", [1, 2, 16, 40])
def test_packets_of_a_transport_stream_are_missed_however_few(
    tmp_path: Path, fill: str, count: int
) -> None:
    """16 of a stream look like none to its counter of 4 bits, unless other streams miss some."""
    path = make_video(tmp_path / "v.ts", frames=60, size=(320, 240), options={**H264, "qp": "10"})
    data = path.read_bytes()
    places = [at for at in range(0, len(data), 188) if data[at + 1] & 0x1F == 1]  # the video's
    first = next(at for at in places if at > len(data) // 2)
    new = b"" if fill == "removed" else FILLS[fill](count * 188)
    path.write_bytes(data[:first] + new + data[first + count * 188 :])
    index = build_index(str(path), LIMITS)
    assert named(index, WarningReason.DAMAGED)
    assert not named(index, WarningReason.CLOCK_RESTARTS)
    assert index.duration_s == pytest.approx(6.0, abs=0.5)


def test_segments_of_a_transport_stream_are_no_damage(tmp_path: Path) -> None:
    """Counters may start anew in each segment; its clock goes on."""
    whole = make_video(tmp_path / "a.ts", frames=50)
    later = make_video(tmp_path / "b.ts", frames=50, shift_ms=5000)
    whole.write_bytes(whole.read_bytes() + later.read_bytes())
    index = build_index(str(whole), LIMITS)
    assert index.frame_count == 100
    assert index.warnings == ()


def test_every_lost_packet_of_a_transport_stream_is_found(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.ts", frames=60)
    data = path.read_bytes()

    def breaks(at: int) -> TransportStream:
        path.write_bytes(data[:at] + data[at + 188 :])
        with path.open("rb") as file:
            found = survey_transport_stream(file, len(data) - 188)
        assert found is not None
        return found

    for at in range(188 * 8, len(data) - 188 * 8, 188 * 3):
        pid = (data[at + 1] & 0x1F) << 8 | data[at + 2]
        later = [
            place
            for place in range(at + 188, len(data), 188)
            if (data[place + 1] & 0x1F) << 8 | data[place + 2] == pid
        ]
        assert breaks(at).breaks == ({pid: [later[0] - 188]} if later else {})


@pytest.mark.parametrize(
    ("first", "last", "count"),
    [(20, 30, 11), (92, 97, 6)],
    ids=["read serially", "at the end"],
)
def test_packets_that_cannot_be_decoded_are_counted(
    tmp_path: Path, first: int, last: int, count: int
) -> None:
    path = make_video(tmp_path / "v.mkv", frames=FRAMES)
    assert not build_index(str(path), LIMITS).warnings
    damage_frames(path, first, last)
    index = build_index(str(path), LIMITS)
    assert index.frame_count < FRAMES - 5
    (message,) = named(index, WarningReason.DAMAGED)
    assert f"at least {count} of its 100 packets" in message


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "flv"])
def test_junk_behind_the_end_is_no_damage(tmp_path: Path, suffix: str) -> None:
    path = make_video(tmp_path / f"v.{suffix}", frames=FRAMES)
    path.write_bytes(path.read_bytes() + bytes(100))
    index = build_index(str(path), LIMITS, allow_truncated=suffix == "flv")
    assert index.frame_count == FRAMES
    assert not named(index, WarningReason.DAMAGED)


def test_only_the_demuxers_own_errors_are_damage() -> None:
    error = 16
    assert says_damaged("matroska,webm", [(error, "matroska,webm", "invalid")])
    assert not says_damaged("matroska,webm", [(error, "h264", "invalid")])
    assert not says_damaged("matroska,webm", [(24, "matroska,webm", "invalid")])
    assert not says_damaged("matroska,webm", [(error, "matroska,webm", "File ended prematurely")])


def test_many_gaps_are_listed_up_to_five() -> None:
    times_s = np.arange(1000.0)
    for frame in range(100, 900, 100):
        times_s[frame:] += 7
    (warning,) = describe_damage(list(range(100, 900, 100)), times_s)
    assert "from second 99.000 to 107.000, 206.000 to 214.000" in warning.message
    assert "and 3 more" in warning.message
    assert describe_damage([], times_s) == ()
    (warning,) = describe_damage([1000], times_s)
    assert "1055.000 to the end" in warning.message
