"""Sizes that change, pixels that are not square, mirrors: what is found and what is shown."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder import frame_sizes
from prefill_service.video.decoder.frame_sizes import (
    Shown,
    SizeRuns,
    StoredSize,
    choose_geometry,
    survey_sizes,
)
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.geometry import FrameSize, Geometry
from prefill_service.video.index import VideoIndex, WarningReason
from tests.video.sample_videos import H264, make_video, numbered_frame, read_number

LIMITS = VideoConfig()
VP8 = {"g": "10", "deadline": "realtime", "cpu-used": "8"}
SMALL = StoredSize(64, 36, Fraction(0))
LARGE = StoredSize(640, 360, Fraction(0))
UPRIGHT = Shown(ratio=Fraction(0), by_container=False, degrees=0.0, mirrored=False)


def make_changing(path: Path, parts: Sequence[tuple[tuple[int, int], int]]) -> Path:
    """VP8 whose frames, 0, 1, ..., have ``parts``: a size and how many frames have it."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=10, options=VP8)
        stream.width, stream.height = parts[0][0]
        stream.pix_fmt = "yuv420p"
        number = 0
        for size, frames in parts:
            encoder = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height = size
            encoder.pix_fmt = "yuv420p"
            encoder.time_base = Fraction(1, 10)
            encoder.options = VP8
            packets = []
            for shown in range(number, number + frames):
                frame = av.VideoFrame.from_ndarray(
                    numbered_frame(shown % 256, *size), format="rgb24"
                )
                frame.pts = shown
                frame.time_base = Fraction(1, 10)
                packets += encoder.encode(frame)
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream = stream
                file.mux(packet)
            number += frames
    return path


def with_ratio(path: Path, ratio: str, size: tuple[int, int] = (96, 64)) -> Path:
    """H.264 in a transport stream: only the codec's header has the ratio."""
    params = f"sar={ratio}:keyint=10:bframes=0"
    return make_video(path, size=size, options={"x264-params": params, "preset": "veryfast"})


def read(path: Path, index: VideoIndex, wanted: list[int], **options: object) -> list[np.ndarray]:
    index.save(path.with_suffix(".npz"))
    arguments = (path, path.with_suffix(".npz"), wanted)
    reader = VideoConfig(reader=str(options.pop("reader", "pyav")))
    with FrameStream.open(*arguments, reader, **options) as stream:  # type: ignore[arg-type]
        return list(stream)


def reasons(index: VideoIndex) -> list[str]:
    return [str(warning.reason) for warning in index.warnings]


# ---- sizes that change ---------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
def test_the_size_of_most_frames_is_the_videos(tmp_path: Path, reader: str) -> None:
    """A call that begins with a stamp's size: none of its frames is shrunk to that."""
    path = make_changing(tmp_path / "v.webm", [((64, 36), 20), ((320, 180), 100)])
    index = build_index(str(path), LIMITS)
    assert (index.width, index.height) == (320, 180)
    assert index.geometry.sizes == (FrameSize(320, 180, 100), FrameSize(64, 36, 20))
    (warning,) = index.warnings
    assert warning.reason is WarningReason.SIZE_CHANGES
    assert "320 x 180 (100 frames), 64 x 36 (20 frames)" in warning.message
    frames = read(path, index, [0, 60, 119], reader=reader)
    assert {frame.shape for frame in frames} == {(180, 320, 3)}
    assert [read_number(frame) for frame in frames] == [0, 60, 119]


def test_a_change_far_from_both_ends_is_found(tmp_path: Path) -> None:
    parts = [((64, 36), 90), ((160, 90), 200), ((64, 36), 90)]
    index = build_index(str(make_changing(tmp_path / "v.webm", parts)), LIMITS)
    assert index.geometry.sizes == (FrameSize(160, 90, 200), FrameSize(64, 36, 180))


def test_a_change_that_the_index_missed_is_counted_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_sizes, "_MAX_SAMPLES", 4)
    parts = [((96, 64), 126), ((48, 32), 4), ((96, 64), 70)]
    path = make_changing(tmp_path / "v.webm", parts)
    index = build_index(str(path), LIMITS)
    assert index.geometry.sizes == (FrameSize(96, 64, 200),)  # none of the samples has it
    index.save(path.with_suffix(".npz"))
    wanted = [3, 125, 126, 127, 127, 129, 130]
    with FrameStream.open(path, path.with_suffix(".npz"), wanted, LIMITS) as stream:
        counts = []
        for frame in stream:
            assert frame.shape == (64, 96, 3)
            counts.append(stream.unlisted)
    assert counts == [0, 0, 1, 2, 2, 3, 3]


def test_a_change_at_the_very_end_is_found(tmp_path: Path) -> None:
    path = make_changing(tmp_path / "v.webm", [((160, 90), 90), ((64, 36), 1)])
    index = build_index(str(path), LIMITS)
    assert index.geometry.sizes == (FrameSize(160, 90, 90), FrameSize(64, 36, 1))
    (frame,) = read(path, index, [90])
    assert read_number(frame) == 90


@pytest.mark.parametrize("reader", ["pyav", "opencv"])  # OpenCV itself would distort it
def test_a_frame_of_another_shape_gets_bars_and_is_not_distorted(
    tmp_path: Path, reader: str
) -> None:
    path = make_changing(tmp_path / "v.webm", [((160, 80), 30), ((80, 160), 10)])
    index = build_index(str(path), LIMITS)
    lying, standing = read(path, index, [0, 35], reader=reader)
    assert lying.shape == standing.shape == (80, 160, 3)
    assert standing[:, :58].max() < 30 > standing[:, 102:].max()  # 40 x 80, in the middle
    assert standing[-5:, 62:68, 0].min() > 150  # its mark, at its lower left
    assert read_number(standing[:, 60:100]) == 35


def test_frames_beyond_the_limit_are_refused_wherever_they_are(tmp_path: Path) -> None:
    path = make_changing(tmp_path / "v.webm", [((64, 36), 100), ((128, 72), 20)])
    limits = VideoConfig(max_frame_pixels=64 * 36)
    with pytest.raises(ServiceError) as caught:
        build_index(str(path), limits)
    assert caught.value.reason is Reason.VIDEO_LIMIT_EXCEEDED
    assert caught.value.metadata["value"] == str(128 * 72)


class Survey:
    """Keyframes of a video with a change at ``change``, and those that were decoded of them."""

    def __init__(self, frames: int, change: int, gop: int = 10) -> None:
        self.frames = frames
        self.change = change
        self.keyframes = np.arange(0, frames, gop)
        self.looked: list[int] = []

    def decode(self, number: int) -> tuple[int, StoredSize] | None:
        self.looked.append(number)
        return number, SMALL if number < self.change else LARGE

    def run(self, head: int = 64) -> Counter[StoredSize]:
        runs = SizeRuns()
        for number in range(head):
            runs.append(SMALL if number < self.change else LARGE)
        return survey_sizes(runs, self.frames, self.keyframes, self.decode)


@pytest.mark.parametrize("change", [10, 70, 5_000, 50_010, 99_990])
def test_a_change_in_a_long_video_is_found_exactly_by_few_keyframes(change: int) -> None:
    survey = Survey(100_000, change)
    assert survey.run() == {SMALL: change, LARGE: 100_000 - change}
    assert len(survey.looked) == len(set(survey.looked)) <= 64


def test_a_long_video_of_one_size_is_not_decoded_whole() -> None:
    survey = Survey(2_000_000, 2_000_000)
    assert survey.run() == {SMALL: 2_000_000}
    assert len(survey.looked) <= 64
    assert survey.looked
    assert max(survey.looked) == 1_999_990


def test_keyframes_that_cannot_be_decoded_do_not_matter() -> None:
    runs = SizeRuns()
    runs.append(LARGE)
    assert survey_sizes(runs, 500, np.arange(0, 500, 10), lambda number: None) == {LARGE: 500}


# ---- pixels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "shown"), [("2/1", (192, 64)), ("1/2", (96, 128)), ("4/3", (128, 64))]
)
def test_pixels_that_are_not_square_are_shown_so(
    tmp_path: Path, ratio: str, shown: tuple[int, int]
) -> None:
    path = with_ratio(tmp_path / "v.ts", ratio)
    index = build_index(str(path), LIMITS)
    assert (index.width, index.height) == shown
    geometry = index.geometry
    assert (geometry.stored_width, geometry.stored_height) == (96, 64)
    assert Fraction(*geometry.sample_aspect_ratio) == Fraction(ratio)
    assert reasons(index) == ["PIXEL_ASPECT"]
    assert f"{shown[0]} x {shown[1]}" in index.warnings[0].message
    for reader in ("pyav", "opencv"):
        (frame,) = read(path, index, [21], reader=reader)
        assert frame.shape == (shown[1], shown[0], 3)
        assert read_number(frame) == 21
    (frame,) = read(path, index, [21], square_pixels=True)
    assert frame.shape == (64, 96, 3)


def test_square_pixels_are_left_alone(tmp_path: Path) -> None:
    for ratio in ("1/1", "0/1"):
        index = build_index(str(with_ratio(tmp_path / "v.ts", ratio)), LIMITS)
        assert (index.width, index.height, index.warnings) == (96, 64, ())


def test_the_container_is_believed_over_the_codec(tmp_path: Path) -> None:
    options = {"x264-params": "sar=2/1", "preset": "veryfast"}  # in the codec's header only
    path = make_video(tmp_path / "v.mp4", pixel_aspect=Fraction(3, 2), options=options)
    index = build_index(str(path), LIMITS)
    assert (index.width, index.height) == (144, 64)
    assert reasons(index) == ["PIXEL_ASPECT", "PIXEL_ASPECT"]
    assert "3:2" in index.warnings[0].message
    assert "2:1" in index.warnings[0].message


@pytest.mark.parametrize("ratio", [Fraction(1000), Fraction(1, 1000), Fraction(11)])
def test_an_absurd_ratio_is_taken_for_a_mistake(ratio: Fraction) -> None:
    shown = Shown(ratio=ratio, by_container=True, degrees=0.0, mirrored=False)
    geometry, (warning,) = choose_geometry(Counter({LARGE: 9}), shown, LIMITS.max_frame_pixels)
    assert geometry == Geometry.square(640, 360, 9)
    assert f"{ratio.numerator}:{ratio.denominator}" in warning.message


def test_a_ratio_that_changes_is_that_of_most_frames() -> None:
    wide = StoredSize(640, 360, Fraction(2))
    shown = Shown(ratio=Fraction(1), by_container=False, degrees=0.0, mirrored=False)
    sizes = Counter({StoredSize(640, 360, Fraction(1)): 10, wide: 90})
    geometry, warnings = choose_geometry(sizes, shown, LIMITS.max_frame_pixels)
    assert (geometry.width, geometry.height) == (1280, 360)
    assert "1:1, 2:1" in warnings[0].message


def test_a_frame_that_would_be_too_large_is_made_narrower_instead() -> None:
    shown = Shown(ratio=Fraction(2), by_container=True, degrees=0.0, mirrored=False)
    geometry, _ = choose_geometry(Counter({LARGE: 9}), shown, 640 * 360)
    assert (geometry.width, geometry.height) == (640, 180)


# ---- orientation ---------------------------------------------------------------------------


def set_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write a display matrix into the track's header of an MP4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # a box of version 0
    a, b, c, d = (value * 65536 for value in matrix)
    x = 96 * 65536 if matrix[0] < 0 or matrix[2] < 0 else 0
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("reader", ["pyav", "opencv"])
@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((1, 0, 0, -1), lambda frame: frame[::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda frame: frame.transpose(1, 0, 2)[::-1, ::-1]),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    ],
    ids=["left_right", "upside_down", "diagonal", "other_diagonal", "only_turned"],
)
def test_mirrors_are_mirrors(tmp_path: Path, matrix: tuple, turned, reader: str) -> None:
    plain = make_video(tmp_path / "plain.mp4", frames=2, options={**H264, "qp": "5"})
    path = set_matrix(make_video(tmp_path / "v.mp4", frames=2, options={**H264, "qp": "5"}), matrix)
    (frame,) = read(path, build_index(str(path), LIMITS), [1], reader=reader)
    (stored,) = read(plain, build_index(str(plain), LIMITS), [1], reader=reader)
    assert np.abs(frame.astype(int) - turned(stored)).mean() < 2


def test_an_angle_between_is_said() -> None:
    shown = Shown(ratio=Fraction(0), by_container=False, degrees=30.0, mirrored=False)
    geometry, (warning,) = choose_geometry(Counter({LARGE: 1}), shown, LIMITS.max_frame_pixels)
    assert geometry.rotation == 0
    assert (warning.reason, "30 degrees" in warning.message) == ("ORIENTATION", True)


# ---- pixel formats -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "file", "pix_fmt"),
    [
        ("libx264", "v.mp4", "yuv420p10le"),
        ("libx264", "v.mp4", "yuvj420p"),
        ("libx264", "v.mp4", "gray"),
        ("libx264", "v.mp4", "yuv444p"),
        ("ffv1", "v.mkv", "bgra"),
        ("ffv1", "v.mkv", "gray16le"),
        ("prores_ks", "v.mov", "yuva444p10le"),
        ("mpeg4", "v.avi", "yuv420p"),
    ],
)
def test_pixel_formats_come_out_as_rgb(tmp_path: Path, codec: str, file: str, pix_fmt: str) -> None:
    options = H264 if codec == "libx264" else {}
    path = make_video(tmp_path / file, codec, 4, pix_fmt=pix_fmt, options=options)
    index = build_index(str(path), LIMITS)
    frames = read(path, index, [0, 1, 2, 3])
    assert [read_number(frame) for frame in frames] == [0, 1, 2, 3]
    mark = frames[0][-8:, 4:12].reshape(-1, 3).mean(0)
    assert (mark[0] > 150 > 100 > mark[1]) != pix_fmt.startswith("gray")
    # FFmpeg encodes gray in full range and says nothing of it, which means limited range.
    assert frames[0][2:8, 40:60].mean() == pytest.approx(27 if pix_fmt == "gray" else 40, abs=6)
