"""What the store knows of a video (``prefill.v1.Video``)."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from prefill_service.video.index import VideoIndex

_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: no i, l, o, u
_VIDEO_ID = re.compile("vid_[0-9a-z]{26}")


def is_video_id(text: str) -> bool:
    """Whether ``text`` can be a video's id. Nothing else may become part of a path."""
    return _VIDEO_ID.fullmatch(text) is not None


def new_video_id() -> str:
    """``vid_`` and 26 characters: 48 bits of time (so that ids sort by age), 80 random ones."""
    number = int(time.time() * 1000) << 80 | secrets.randbits(80)
    return "vid_" + "".join(_BASE32[number >> 5 * i & 31] for i in reversed(range(26)))


class VideoState(StrEnum):
    """Life of a video."""

    UPLOADING = "UPLOADING"
    PROBING = "PROBING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What probing found (``prefill.v1.VideoInfo``)."""

    container: str
    codec: str
    width: int
    height: int
    frame_count: int
    fps: float
    duration_s: float
    keyframe_count: int

    @classmethod
    def of(cls, index: VideoIndex) -> VideoInfo:
        """Sum up an index."""
        return cls(**{name: getattr(index, name) for name in cls.__slots__})

    def to_dict(self) -> dict[str, Any]:
        """JSON form; ``VideoInfo(**data)`` is the inverse."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """One stored video or upload.

    Attributes:
        committed_bytes: bytes received; after a crash of the service, those the file holds.
        sha256: lower-case hexadecimal.
        create_time, expire_time: seconds since the epoch.
        info: set when READY.
        error_reason, error_message: set when FAILED.
    """

    video_id: str
    display_name: str
    state: VideoState
    size_bytes: int
    committed_bytes: int
    sha256: str
    create_time: float
    expire_time: float
    info: VideoInfo | None = None
    error_reason: str = ""
    error_message: str = ""
