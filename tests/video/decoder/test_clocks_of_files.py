"""Clocks of generated files: every container x rate x join x jitter x header value."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.index import VideoIndex, WarningReason

NTSC = Fraction(30000, 1001)
JOINS = {WarningReason.CLOCK_RESTARTS, WarningReason.CLOCK_JUMPS}
# How a part's frames come: constant, with jitter, or slower from its middle on.
TIMINGS = ("constant", "jitter", "variable")


@dataclass(frozen=True)
class Part:
    """A recording: its frames' times, and where its clock begins."""

    times_s: np.ndarray
    step_s: float
    start_s: float = 0.0


def make_part(rate: Fraction, timing: str, frames: int = 50, start_s: float = 0.0) -> Part:
    step = float(1 / rate)
    times = np.arange(frames) * step
    if timing == "jitter":
        times[1:] += np.random.default_rng(0).uniform(-0.3, 0.3, frames - 1) * step
    elif timing == "variable":
        times[frames // 2 :] += np.arange(frames - frames // 2) * 11 * step
    return Part(times, step, start_s)


def write_part(path: Path, part: Part, codec: str, header_rate: Fraction) -> bytes:
    """Write a part of tiny frames, its file's header saying ``header_rate``."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=header_rate, options={"g": "12"})
        stream.width = 32
        stream.height = 32
        stream.pix_fmt = "yuv420p"
        counted = codec == "mpeg2video" or path.suffix == ".avi"
        ticks = header_rate if counted else Fraction(90000)
        stream.codec_context.time_base = 1 / ticks
        packets: list[av.Packet] = []
        for number, time in enumerate(part.times_s):
            picture = np.full((32, 32, 3), number * 5 % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round(time * ticks)
            frame.time_base = 1 / ticks
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            shift = round(part.start_s / packet.time_base)
            packet.pts += shift
            packet.dts += shift
            packet.duration = 0  # muxers then use the header's rate, or nothing
            file.mux(packet)
    return path.read_bytes()


def write_parts(
    path: Path, parts: Sequence[Part], codec: str, header_rate: Fraction | None = None
) -> Path:
    """Write a file of parts appended to one another."""
    rates = [header_rate or Fraction(1 / part.step_s).limit_denominator(1001) for part in parts]
    written = [write_part(path, part, codec, rate) for part, rate in zip(parts, rates, strict=True)]
    path.write_bytes(b"".join(written))
    return path


def true_times(parts: Sequence[Part]) -> np.ndarray:
    begin = 0.0
    found = []
    for part in parts:
        found.append(begin + part.times_s)
        begin += part.times_s[-1] + part.step_s
    return np.concatenate(found)


def check_clock(index: VideoIndex, parts: Sequence[Part], *, constant: bool) -> None:
    times = true_times(parts)
    half = max(part.step_s for part in parts) / 2 + 0.001
    assert index.frame_count == len(times)
    np.testing.assert_allclose(index.times_s, times, atol=half)
    last = np.diff(times, prepend=-parts[-1].step_s)[-1]
    ends = (times[-1] + parts[-1].step_s - half, times[-1] + last + half)
    assert ends[0] <= index.duration_s <= ends[1]
    if constant:
        assert index.fps == pytest.approx(1 / parts[0].step_s, rel=1e-3)
        assert np.abs(np.arange(len(times)) / index.fps - times).max() <= half
    else:
        assert index.fps == pytest.approx(len(times) / index.duration_s, rel=0.02)
    joined = JOINS & {warning.reason for warning in index.warnings}
    assert bool(joined) == (len(parts) > 1)


CODECS = {
    "mp4": "libx264", "mov": "libx264", "mkv": "libx264", "webm": "libvpx", "ts": "libx264",
    "flv": "libx264",
}  # fmt: skip
RATES = (Fraction(25), NTSC, Fraction(10))
SINGLE = list(itertools.product(CODECS, RATES, TIMINGS))


@pytest.mark.parametrize(("suffix", "rate", "timing"), SINGLE)
@pytest.mark.parametrize("header", [None, Fraction(1000), Fraction(5)], ids=str)
def test_one_recording(
    tmp_path: Path, suffix: str, rate: Fraction, timing: str, header: Fraction | None
) -> None:
    part = make_part(rate, timing)
    path = write_parts(tmp_path / f"v.{suffix}", [part], CODECS[suffix], header or rate)
    index = build_index(str(path), VideoConfig())
    check_clock(index, [part], constant=timing == "constant")


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_avi_whose_frames_have_no_times_of_showing(
    tmp_path: Path, codec: str, rate: Fraction
) -> None:
    part = make_part(rate, "constant")
    path = write_parts(tmp_path / "v.avi", [part], codec)
    index = build_index(str(path), VideoConfig())
    check_clock(index, [part], constant=True)
    assert index.warnings == ()


APPENDED = {"ts": "libx264", "mpg": "mpeg2video", "mkv": "libx264"}
# Rate, timing and start of each part's clock. Times to 5,000 s ahead are more than an hour.
JOINED = {
    "restart": [(25, "constant", 0), (25, "constant", 0)],
    "restart_by_a_second": [(25, "constant", 0), (25, "constant", 1.01)],
    "other_rate": [(30, "constant", 0), (25, "constant", 0)],
    "hours_ahead": [(25, "constant", 0), (25, "constant", 50000)],
    "hours_back": [(25, "constant", 50000), (25, "constant", 0)],
    "many": [(25, "constant", 0), (30, "constant", 9000), (25, "constant", 3), (25, "constant", 1)],
    "jitter": [(25, "jitter", 0), (25, "jitter", 0), (25, "jitter", 5000)],
    "variable": [(25, "variable", 0), (10, "constant", 0)],
}  # fmt: skip
# MPEG-2's encoder takes constant rates only; FFmpeg reads no third file appended in Matroska.
APPENDABLE = [
    (suffix, join)
    for suffix, join in itertools.product(APPENDED, JOINED)
    if not (suffix == "mpg" and join in ("jitter", "variable"))
    and not (suffix == "mkv" and len(JOINED[join]) > 2)
]


@pytest.mark.parametrize(("suffix", "join"), APPENDABLE)
def test_joined_recordings(tmp_path: Path, suffix: str, join: str) -> None:
    parts = [make_part(Fraction(r), timing, start_s=start) for r, timing, start in JOINED[join]]
    path = write_parts(tmp_path / f"v.{suffix}", parts, APPENDED[suffix])
    constant = len({part.step_s for part in parts}) == 1 and join not in ("jitter", "variable")
    check_clock(build_index(str(path), VideoConfig()), parts, constant=constant)


@pytest.mark.parametrize(("suffix", "read"), [("mp4", 1), ("mov", 1), ("mkv", 2), ("flv", 1)])
def test_appended_files_that_are_not_read_are_said(tmp_path: Path, suffix: str, read: int) -> None:
    parts = [make_part(Fraction(25), "constant")] * 3
    path = write_parts(tmp_path / f"v.{suffix}", parts, "libx264")
    index = build_index(str(path), VideoConfig())
    check_clock(index, parts[:read], constant=True)
    warning = index.warnings[-1]
    assert warning.reason is WarningReason.APPENDED
    size = path.stat().st_size
    assert "3 files appended to one another, of a format" in warning.message
    assert f"byte {size // 3 * read} of {size} is not part" in warning.message


def test_appended_avi_is_read_and_said(tmp_path: Path) -> None:
    parts = [make_part(Fraction(25), "constant")] * 2
    path = write_parts(tmp_path / "v.avi", parts, "mpeg4")
    index = build_index(str(path), VideoConfig())
    np.testing.assert_allclose(index.times_s, true_times(parts))
    found = [warning.reason for warning in index.warnings]
    assert found == [WarningReason.FRAME_COUNT, WarningReason.DURATION]


def test_transport_stream_joined_some_minutes_ahead(tmp_path: Path) -> None:
    parts = [make_part(Fraction(25), "constant"), make_part(Fraction(25), "constant", 50, 600)]
    path = write_parts(tmp_path / "v.ts", parts, "libx264", Fraction(25))
    check_clock(build_index(str(path), VideoConfig()), parts, constant=True)


def test_clock_of_33_bits_that_overflows_is_no_join(tmp_path: Path) -> None:
    part = make_part(NTSC, "constant", start_s=(1 << 33) / 90000 - 1)
    path = write_parts(tmp_path / "v.ts", [part], "libx264", NTSC)
    check_clock(build_index(str(path), VideoConfig()), [part], constant=True)


PAUSES = {
    "a_frame_every_10_s": np.arange(60) * 10.0,
    "fast_then_a_frame_every_20_s": np.append(np.arange(40) / 25, 1.6 + np.arange(1, 30) * 20),
    "slides": np.cumsum(np.random.default_rng(1).choice([0.2, 1, 15, 90, 400], 60)),
    "last_frame_after_minutes": np.append(np.arange(60) / 25, 300.0),
    "first_frame_for_minutes": np.append(0, 300.0 + np.arange(60) / 25),
}


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4"])
@pytest.mark.parametrize("pause", PAUSES)
def test_frames_that_are_shown_long_are_no_joins(tmp_path: Path, suffix: str, pause: str) -> None:
    times = PAUSES[pause] - PAUSES[pause][0]
    part = Part(times, 0.04)
    path = write_parts(tmp_path / f"v.{suffix}", [part], "libx264", Fraction(25))
    index = build_index(str(path), VideoConfig())
    np.testing.assert_allclose(index.times_s, times, atol=0.002)
    assert not JOINS & {warning.reason for warning in index.warnings}


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "flv"])
@pytest.mark.parametrize("frames", [1, 2])
def test_hardly_a_frame(tmp_path: Path, suffix: str, frames: int) -> None:
    part = make_part(Fraction(25), "constant", frames)
    path = write_parts(tmp_path / f"v.{suffix}", [part], "libx264", Fraction(25))
    check_clock(build_index(str(path), VideoConfig()), [part], constant=True)
