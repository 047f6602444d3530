from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from prefill_service.video.decoder.protocol import index_from_message, index_to_message
from prefill_service.video.geometry import FrameSize, Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason
from prefill_service.video.records import VideoInfo

GEOMETRY = Geometry(
    width=36,
    height=128,
    stored_width=64,
    stored_height=36,
    rotation=90,
    mirrored=True,
    sample_aspect_ratio=(2, 1),
    sizes=(FrameSize(64, 36, 2), FrameSize(16, 9, 1)),
)
WARNINGS = (VideoWarning(WarningReason.CLOCK_RATE, "it says 1000 fps; it has 10"),)


def make_index(warnings: tuple[VideoWarning, ...]) -> VideoIndex:
    return VideoIndex(
        container="matroska,webm",
        codec="h264",
        geometry=GEOMETRY,
        time_base=(1, 1000),
        pts=np.array([5, 105, 206]),
        keyframe=np.array([True, False, True]),
        times_s=np.array([0.0, 0.1, 0.201]),
        fps=10.0,
        duration_s=0.3,
        warnings=warnings,
    )


def assert_same(index: VideoIndex, other: VideoIndex) -> None:
    for field in fields(VideoIndex):
        assert np.array_equal(getattr(index, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("warnings", [(), WARNINGS], ids=["no_warning", "a_warning"])
def test_an_index_survives_its_file_the_pipe_and_the_database(
    tmp_path: Path, warnings: tuple[VideoWarning, ...]
) -> None:
    index = make_index(warnings)
    index.save(tmp_path / "index.npz")
    assert_same(VideoIndex.load(tmp_path / "index.npz"), index)
    header, payload = index_to_message(index)
    again, rest = index_from_message(header, payload + b"more")
    assert_same(again, index)
    assert rest == b"more"
    info = VideoInfo.from_index(index)
    assert info.warnings == warnings
    assert VideoInfo.from_dict(info.to_dict()) == info
