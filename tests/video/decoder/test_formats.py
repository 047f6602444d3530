"""Containers and codecs that are accepted beside the usual ones, and those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import WarningReason
from tests.video.sample_videos import make_video, read_number

LIMITS = VideoConfig()
FORMATS: dict[str, tuple[str, str, dict]] = {
    "gif": ("v.gif", "gif", {"pix_fmt": "rgb8"}),
    "apng": ("v.apng", "apng", {"pix_fmt": "rgb24"}),
    "quicktime_rle": ("v.mov", "qtrle", {"pix_fmt": "rgb24"}),
    "mxf": ("v.mxf", "mpeg2video", {"rate": 25}),
    "dv": ("v.dv", "dvvideo", {"size": (720, 576), "rate": 25}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_of_a_serial_reader(name: str, tmp_path: Path) -> None:
    file, codec, arguments = FORMATS[name]
    path = make_video(tmp_path / file, codec, 40, options={}, **arguments)
    index = build_index(str(path), LIMITS)
    assert index.frame_count == 40
    index.save(tmp_path / "index.npz")
    wanted = [0, 1, 13, 27, 39]
    for reader in ("pyav", "opencv"):
        limits = VideoConfig(reader=reader)
        with FrameStream.open(path, tmp_path / "index.npz", wanted, limits) as stream:
            assert [read_number(frame) for frame in stream] == wanted, reader


def test_another_codec_is_refused_with_those_accepted(tmp_path: Path) -> None:
    path = make_video(tmp_path / "v.mov", "cinepak", 4, pix_fmt="rgb24", options={})
    with pytest.raises(ServiceError, match=r"codec 'cinepak' .* accepted: h264, .*qtrle") as caught:
        build_index(str(path), LIMITS)
    assert caught.value.reason is Reason.FORMAT_NOT_ALLOWED


def test_webp_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "v.webp"
    pictures = [Image.new("RGB", (64, 48), (20 * i, 0, 0)) for i in range(5)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(ServiceError, match=r"WebP is not accepted.* to APNG or MP4") as caught:
        build_index(str(path), LIMITS)
    assert caught.value.reason is Reason.FORMAT_NOT_ALLOWED


@pytest.mark.parametrize("fields", [True, False])
def test_interlaced_frames_are_said(tmp_path: Path, fields: bool) -> None:
    options = {"x264-params": f"keyint=10:{'tff=1' if fields else ''}", "preset": "veryfast"}
    path = make_video(tmp_path / "v.mp4", frames=20, options=options)
    warnings = build_index(str(path), LIMITS).warnings
    assert [one.reason for one in warnings] == ([WarningReason.INTERLACED] if fields else [])
    if fields:
        assert warnings[0].message.startswith("20 of the first 20 frames are interlaced")
