"""The seek schedule, and that the PyAV reader keeps to it."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import ServiceError
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.readers.pyav import PyAVReader, can_skip
from prefill_service.video.decoder.seek_schedule import Seek, gop_starts, schedule_seeks
from tests.video.sample_videos import H264, damage_frames, make_video, read_number

X265 = "keyint=40:min-keyint=40:bframes=3:scenecut=0:log-level=none:pools=none"


def flags(frames: int, *keys: int) -> np.ndarray:
    keyframe = np.zeros(frames, bool)
    keyframe[list(keys)] = True
    return keyframe


def test_neighbouring_gops_share_one_seek_and_gaps_need_another() -> None:
    starts = gop_starts(flags(50, 0, 10, 20, 30, 40))
    assert schedule_seeks(starts, [1, 5, 12, 35, 41]) == [Seek(0, (1, 5, 12)), Seek(3, (35, 41))]
    assert schedule_seeks(starts, [45]) == [Seek(4, (45,))]
    assert schedule_seeks(starts, []) == []


def test_frames_ahead_of_the_first_keyframe_belong_to_the_start_of_the_file() -> None:
    starts = gop_starts(flags(30, 8, 20))
    assert starts.tolist() == [0, 8, 20]
    assert schedule_seeks(starts, [3, 25]) == [Seek(0, (3,)), Seek(2, (25,))]


def test_file_without_keyframe_flags_is_one_gop() -> None:
    assert gop_starts(flags(5)).tolist() == [0]


def test_reader_decodes_only_the_gops_it_needs(tmp_path: Path) -> None:
    options = {**H264, "g": "20", "bf": "0", "sc_threshold": "0"}
    path = make_video(tmp_path / "long.mp4", frames=200, options=options)
    limits = VideoConfig()
    reader = PyAVReader.open(str(path), build_index(str(path), limits), limits, 1)
    frames = list(reader.frames([2, 65, 66, 81, 199]))
    assert [read_number(frame) for frame in frames] == [2, 65, 66, 81, 199]
    # 0-2, then 60-81 in one go (GOPs 3 and 4), then 180-199
    assert reader.seeks == 2
    assert reader.decoded == 3 + 22 + 20


def test_what_follows_the_last_wanted_frame_of_a_gop_is_seeked_over() -> None:
    starts = gop_starts(flags(300, 0, 100, 200))
    assert schedule_seeks(starts, [10, 83, 84, 150, 250]) == [
        Seek(0, (10, 83, 84, 150)),
        Seek(2, (250,)),
    ]
    assert schedule_seeks(starts, [10, 83, 150]) == [Seek(0, (10, 83)), Seek(1, (150,))]


@pytest.mark.parametrize(
    ("codec", "options", "suffix"),
    [
        ("libx264", {"g": "40", "bf": "3", "sc_threshold": "0", "preset": "fast"}, "mp4"),
        # Two fields a frame, and no word in the stream on how far its frames are reordered.
        ("libx264", {"g": "40", "bf": "3", "flags": "+ildct+ilme", "x264-params": "tff=1"}, "ts"),
        ("libx265", {"x265-params": f"{X265}:temporal-layers=0"}, "mp4"),
        ("mpeg4", {"g": "40", "bf": "2"}, "mp4"),
        ("mpeg2video", {"g": "40", "bf": "2"}, "ts"),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_leaving_out_unreferenced_frames_changes_no_bit_of_the_others(
    codec: str, options: dict[str, str], suffix: str, threads: int, tmp_path: Path
) -> None:
    path = make_video(tmp_path / f"v.{suffix}", codec, 120, size=(160, 96), options=options)
    with av.open(str(path)) as file:
        serial = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    limits = VideoConfig()
    index = build_index(str(path), limits)
    assert index.frame_count == len(serial) == 120
    assert index.keyframe_count
    for first in range(13):
        wanted = list(range(first, 120, 13))
        reader = PyAVReader.open(str(path), index, limits, threads)
        for number, frame in zip(wanted, reader.frames(wanted), strict=True):
            np.testing.assert_array_equal(frame, serial[number])
        assert reader.decoded < 0.75 * 120


def test_hevc_with_temporal_layers_is_decoded_whole(tmp_path: Path) -> None:
    """A picture that its own layer does not need may be what a higher one refers to."""
    options = {"x265-params": f"{X265}:temporal-layers=3"}
    layered = make_video(tmp_path / "a.mp4", "libx265", 120, size=(160, 96), options=options)
    limits = VideoConfig()
    reader = PyAVReader.open(str(layered), build_index(str(layered), limits), limits, 1)
    with av.open(str(layered)) as file:
        serial = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert not can_skip(file.streams.video[0].codec_context)
    for number, frame in zip(range(5, 120, 13), reader.frames(range(5, 120, 13)), strict=True):
        np.testing.assert_array_equal(frame, serial[number])
    assert reader.decoded > 0.8 * 120
    raw = make_video(tmp_path / "a.ts", "libx265", 40, options={"x265-params": X265})
    with av.open(str(raw)) as file:  # no record says how many layers there are
        assert not can_skip(file.streams.video[0].codec_context)


def test_damage_far_behind_a_seek_costs_a_few_gops_decoded_again(
    tmp_path: Path,
) -> None:
    options = {**H264, "g": "20", "bf": "0", "sc_threshold": "0"}
    path = make_video(tmp_path / "long.mp4", frames=200, options=options)
    limits = VideoConfig()
    index = build_index(str(path), limits)
    damage_frames(path, 140, 159)
    reader = PyAVReader.open(str(path), index, limits, 1)
    frames = reader.frames(range(0, 200, 15))
    with pytest.raises(ServiceError, match=r"frame 150 at 15\.000 s"):
        list(frames)
    assert reader.decoded <= 160 + 4 * 20
