"""The GOP plan, and that the PyAV reader keeps to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.errors import ServiceError
from prefill_service.video.gop import Run, gop_starts, plan_runs
from prefill_service.video.indexing import build_index
from prefill_service.video.pyav_reader import PyAVReader
from tests.video.make import H264, damage_frames, make_video, read_number


def flags(frames: int, *keys: int) -> np.ndarray:
    keyframe = np.zeros(frames, bool)
    keyframe[list(keys)] = True
    return keyframe


def test_neighbouring_gops_form_one_run_and_gaps_start_another() -> None:
    starts = gop_starts(flags(50, 0, 10, 20, 30, 40))
    assert plan_runs(starts, [1, 5, 12, 35, 41]) == [Run(0, (1, 5, 12)), Run(3, (35, 41))]
    assert plan_runs(starts, [45]) == [Run(4, (45,))]
    assert plan_runs(starts, []) == []


def test_frames_ahead_of_the_first_keyframe_belong_to_the_start_of_the_file() -> None:
    starts = gop_starts(flags(30, 8, 20))
    assert starts.tolist() == [0, 8, 20]
    assert plan_runs(starts, [3, 25]) == [Run(0, (3,)), Run(2, (25,))]


def test_file_without_keyframe_flags_is_one_gop() -> None:
    assert gop_starts(flags(5)).tolist() == [0]


def test_reader_decodes_only_the_gops_it_needs(tmp_path: Path) -> None:
    options = {**H264, "g": "20", "bf": "0", "sc_threshold": "0"}
    path = make_video(tmp_path / "long.mp4", frames=200, options=options)
    limits = VideoConfig()
    reader = PyAVReader(str(path), build_index(str(path), limits), limits, 1)
    frames = list(reader.frames([2, 65, 66, 81, 199]))
    assert [read_number(frame) for frame in frames] == [2, 65, 66, 81, 199]
    # 0-2, then 60-81 in one go (GOPs 3 and 4), then 180-199
    assert reader.seeks == 2
    assert reader.decoded == 3 + 22 + 20


def test_damage_deep_in_a_run_is_reported_without_decoding_again(tmp_path: Path) -> None:
    options = {**H264, "g": "20", "bf": "0", "sc_threshold": "0"}
    path = make_video(tmp_path / "long.mp4", frames=200, options=options)
    limits = VideoConfig()
    index = build_index(str(path), limits)
    damage_frames(path, 140, 159)
    reader = PyAVReader(str(path), index, limits, 1)
    frames = reader.frames(range(0, 200, 15))
    with pytest.raises(ServiceError, match=r"frame 150 at 15\.000 s"):
        list(frames)
    assert reader.decoded <= 200
