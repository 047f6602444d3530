"""A file put together from repeated packets is an ordinary video to whoever reads it."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import numpy as np
import pytest

from prefill_service.config import VideoConfig
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.decoder.readers.pyav import PyAVReader
from tools.make_hour_video import HourOptions, scene_order, write_hour

SMALL = HourOptions(seconds=31, fps=10, width=160, height=96, scenes=3)


def test_every_frame_decodes_at_its_time_and_gops_begin_as_asked(tmp_path: Path) -> None:
    path = write_hour(tmp_path / "v.mp4", SMALL)
    limits = VideoConfig()
    index = build_index(str(path), limits)
    assert (index.width, index.height, index.codec) == (160, 96, "h264")
    assert index.frame_count == 4 * 80  # rounded up to whole GOPs
    assert index.duration_s == pytest.approx(32, abs=0.01)
    assert np.flatnonzero(index.keyframe).tolist() == [0, 80, 160, 240]
    assert set(np.diff(index.pts)) == {index.pts[1]}
    with av.open(str(path)) as file:
        serial = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(serial) == index.frame_count
    wanted = list(range(7, 320, 31))
    reader = PyAVReader.open(str(path), index, limits, 1)
    for number, frame in zip(wanted, reader.frames(wanted), strict=True):
        np.testing.assert_array_equal(frame, serial[number])
    # Neighbouring GOPs show different scenes, and a scene moves.
    for start in (0, 80, 160):
        assert np.abs(serial[start].astype(int) - serial[start + 80]).mean() > 10
        assert np.abs(serial[start].astype(int) - serial[start + 79]).mean() > 5


def test_no_scene_is_shown_twice_in_a_row() -> None:
    order = scene_order(HourOptions())
    assert len(order) == 450
    assert all(one != two for one, two in itertools.pairwise(order))
    assert set(order) == set(range(HourOptions().scenes))


def test_one_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="scenes is 1; it must be 2 or more"):
        write_hour(Path("unused.mp4"), HourOptions(scenes=1))
