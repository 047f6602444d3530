"""Both readers, through the sandbox, against a plain serial reader of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video
from tests.video.conftest import SAMPLES, VFR_TIMES
from tests.video.sample_videos import make_video, read_number, serial_pts

TURNS = {"h264_turned_left": 1, "h264_turned_right": -1, "h264_upside_down": 2}
# Frames are numbered from 0 except where the file hides the first ones.
HIDDEN = {"h264_edit_list": 15}


def read(path: Path, index: VideoIndex, wanted: list[int], reader: str) -> list[np.ndarray]:
    index_path = path.with_name("index.npz")
    index.save(index_path)
    with FrameStream.open(path, index_path, wanted, VideoConfig(reader=reader)) as stream:
        return list(stream)


@pytest.mark.parametrize("name", SAMPLES)
async def test_both_readers_return_the_frames_of_a_serial_reader(
    name: str, samples: dict[str, Path]
) -> None:
    path = samples[name]
    index = await index_video(path, VideoConfig())
    serial = serial_pts(path)
    assert index.frame_count == len(serial)
    if index.keyframe_count:
        assert index.pts.tolist() == serial
    assert (np.diff(index.pts) > 0).all()

    wanted = sorted({*range(0, index.frame_count, 7), index.frame_count - 1})
    expected = [HIDDEN.get(name, 0) + i for i in wanted]
    by_reader = {reader: read(path, index, wanted, reader) for reader in ("pyav", "opencv")}
    for reader, frames in by_reader.items():
        assert {frame.shape for frame in frames} == {(index.height, index.width, 3)}
        upright = [np.rot90(frame, -TURNS.get(name, 0)) for frame in frames]
        assert [read_number(frame) for frame in upright] == expected, reader
    for ours, theirs in zip(*by_reader.values(), strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 2


@pytest.mark.parametrize(
    ("name", "size", "rotation"),
    [
        ("h264_odd_size", (99, 67), 0),
        ("h264_turned_left", (64, 96), 90),
        ("h264_turned_right", (64, 96), 270),
        ("h264_upside_down", (96, 64), 180),
    ],
)
async def test_index_gives_the_size_after_rotation(
    name: str, size: tuple[int, int], rotation: int, samples: dict[str, Path]
) -> None:
    index = await index_video(samples[name], VideoConfig())
    assert ((index.width, index.height), index.geometry.rotation) == (size, rotation)


async def test_turned_frame_shows_its_mark_where_the_matrix_puts_it(
    samples: dict[str, Path],
) -> None:
    path = samples["h264_turned_left"]  # the mark at the lower left goes to the lower right
    (frame,) = read(path, await index_video(path, VideoConfig()), [0], "pyav")
    assert frame[-5, -5, 0] > 150 > 100 > frame[-5, -5, 1]
    assert frame[-5, 5, 0] < 100


async def test_variable_frame_rate_keeps_its_times(samples: dict[str, Path]) -> None:
    index = await index_video(samples["h264_vfr_mp4"], VideoConfig())
    seconds = index.pts * index.time_base[0] / index.time_base[1]
    np.testing.assert_allclose(seconds * 1000, VFR_TIMES, atol=1)
    span = (VFR_TIMES[-1] - VFR_TIMES[0]) / 1000
    assert span <= index.duration_s <= span + 0.31
    assert index.fps == pytest.approx(40 / index.duration_s, rel=0.02)


async def test_repeats_give_the_same_frame_again(samples: dict[str, Path]) -> None:
    path = samples["h264_b_frames"]
    index = await index_video(path, VideoConfig())
    frames = read(path, index, [3, 3, 25, 39, 39, 39], "pyav")
    assert [read_number(frame) for frame in frames] == [3, 3, 25, 39, 39, 39]


async def test_file_cut_in_mid_gop_lists_only_what_decodes(
    samples: dict[str, Path], tmp_path: Path
) -> None:
    # A transport stream that begins after its first keyframe: 188 bytes a packet.
    data = samples["h264_ts"].read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: 188 * 3] + data[188 * 12 :])
    index = await index_video(cut, VideoConfig())
    serial = serial_pts(cut)
    assert 100 < len(serial) < 200
    assert index.pts.tolist() == serial
    wanted = [0, 5, 77, index.frame_count - 1]
    first = 200 - len(serial)
    for reader in ("pyav", "opencv"):
        frames = read(cut, index, wanted, reader)
        assert [read_number(frame) for frame in frames] == [first + i for i in wanted], reader


async def test_transport_stream_cut_at_its_end_keeps_every_whole_frame(
    samples: dict[str, Path], tmp_path: Path
) -> None:
    data = samples["h264_ts"].read_bytes()
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: int(len(data) * 0.9)])
    index = await index_video(cut, VideoConfig(), allow_truncated=True)
    assert index.pts.tolist() == serial_pts(cut)
    assert index.keyframe_count  # still by the seek schedule, not serially
    # The cut took frames that were sent late and shown early, so numbers may have a gap.
    numbers = {pts: number for number, pts in enumerate(serial_pts(samples["h264_ts"]))}
    wanted = [0, 100, index.frame_count - 2, index.frame_count - 1]
    for reader in ("pyav", "opencv"):
        frames = read(cut, index, wanted, reader)
        assert [read_number(f) for f in frames] == [numbers[index.pts[i]] for i in wanted], reader


async def test_joined_recordings_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    """The clock of the second one starts again, between the times of the first one's frames."""
    one = make_video(tmp_path / "one.ts", frames=150)
    two = make_video(tmp_path / "two.ts", frames=100, shift_ms=50)
    both = tmp_path / "both.ts"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    index = await index_video(both, VideoConfig())
    assert index.frame_count == len(serial_pts(both))
    wanted = [0, 149, index.frame_count - 100, index.frame_count - 1]
    for reader in ("pyav", "opencv"):
        frames = read(both, index, wanted, reader)
        assert [read_number(frame) for frame in frames] == [0, 149, 0, 99], reader
