from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.video.store import VideoStore
from tests.video.sample_videos import H264, make_video
from tests.video.uploading import OpenStore

VFR_TIMES = np.cumsum(np.random.default_rng(0).integers(10, 300, 40)).tolist()
X265 = "keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0:log-level=none:pools=none"
OPEN_GOP = "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"

# name -> file name and arguments of make_video
SAMPLES: dict[str, tuple[str, dict[str, object]]] = {
    "h264_b_frames": ("v.mp4", {}),
    "h264_open_gop": ("v.mp4", {"options": {"x264-params": OPEN_GOP}}),
    "h264_intra_refresh": (
        "v.mp4", {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}},
    ),
    "h264_fragmented": (
        "v.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    ),
    "h264_edit_list": (
        "v.mp4", {"container_options": {"avoid_negative_ts": "disabled"}, "shift_ms": -1500},
    ),
    "h264_vfr_mp4": ("v.mp4", {"times_ms": VFR_TIMES}),
    "h264_vfr_mkv": ("v.mkv", {"times_ms": VFR_TIMES}),
    "h264_ts": ("v.ts", {"frames": 200, "options": {**H264, "g": "20"}}),
    "h264_avi_no_pts": ("v.avi", {}),
    "h264_flv": ("v.flv", {}),
    "h264_odd_size": ("v.mp4", {"size": (99, 67), "pix_fmt": "yuv444p"}),
    "h264_turned_left": ("v.mp4", {"rotation": 90}),
    "h264_turned_right": ("v.mp4", {"rotation": -90}),
    "h264_upside_down": ("v.mp4", {"rotation": 180}),
    "h264_one_frame": ("v.mp4", {"frames": 1}),
    "hevc_open_gop": ("v.mp4", {"codec": "libx265", "options": {"x265-params": X265}}),
    "mpeg4_b_frames": ("v.mp4", {"codec": "mpeg4", "options": {"g": "10", "bf": "2"}}),
    "mpeg4_avi": ("v.avi", {"codec": "mpeg4", "options": {"g": "10", "bf": "2"}}),
    "mpeg2_ps": (
        "v.mpg",
        {"codec": "mpeg2video", "options": {"g": "10", "bf": "2"}, "container_format": "mpeg"},
    ),
    "vp9_webm": (
        "v.webm", {"codec": "libvpx-vp9", "options": {"g": "10", "deadline": "realtime",
                                                      "cpu-used": "8"}},
    ),
    "vp8_alt_ref": (
        "v.webm", {"codec": "libvpx", "frames": 60,
                   "options": {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16", "b": "40k"}},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every sample video by name."""
    made = {}
    for name, (file, arguments) in SAMPLES.items():
        made[name] = make_video(tmp_path_factory.mktemp(name) / file, **arguments)
    return made


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[OpenStore]:
    """``open_store(**storage)`` opens a store on the test's folder, the former one closed."""
    stores: list[VideoStore] = []

    def opened(**storage: object) -> VideoStore:
        config = StorageConfig(data_dir=str(tmp_path / "data"), min_free_bytes=0)
        for name, value in storage.items():
            setattr(config, name, value)
        stores.append(VideoStore.open(config, VideoConfig()))
        return stores[-1]

    yield opened
    if stores:
        await stores[-1].close()


@pytest.fixture
def store(open_store: OpenStore) -> VideoStore:
    return open_store()


@pytest.fixture
def video(samples: dict[str, Path]) -> bytes:
    return samples["h264_b_frames"].read_bytes()
