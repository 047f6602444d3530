"""A stored video as the API describes it (``prefill.v1.Video``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from prefill_service.video.geometry import Geometry
from prefill_service.video.index import (
    VideoIndex,
    VideoWarning,
    WarningReason,
    warnings_from_pairs,
)


class VideoState(StrEnum):
    """Where a video is on its way from an announced upload to frames that can be decoded."""

    UPLOADING = "UPLOADING"
    PROBING = "PROBING"
    READY = "READY"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """The summary of a video's index (``prefill.v1.VideoInfo``)."""

    container: str
    codec: str
    geometry: Geometry
    frame_count: int
    fps: float
    duration_s: float
    keyframe_count: int
    warnings: tuple[VideoWarning, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether the file is cut, and what can be read of it was taken."""
        return any(w.reason is WarningReason.TRUNCATED for w in self.warnings)

    @classmethod
    def from_index(cls, index: VideoIndex) -> VideoInfo:
        """The index without its frames."""
        return cls(**{name: getattr(index, name) for name in cls.__slots__})

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the inverse of ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VideoInfo:
        """Rebuild the summary from its JSON form; earlier formats have no ``geometry``."""
        pairs = [(entry["reason"], entry["message"]) for entry in data.get("warnings", ())]
        rest = {name: data[name] for name in cls.__slots__ if name in data}
        if "geometry" in data:
            geometry = Geometry.from_dict(data["geometry"])
        else:
            geometry = Geometry.square(data["width"], data["height"], data["frame_count"])
        return cls(**{**rest, "geometry": geometry, "warnings": warnings_from_pairs(pairs)})


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
