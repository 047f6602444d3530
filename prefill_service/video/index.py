"""The index of a video: its frames' times and keyframes, found without decoding it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from prefill_service.video.geometry import Geometry


class WarningReason(StrEnum):
    """Stable reasons of a ``VideoWarning``; docs/api.md says what each means."""

    CLOCK_RATE = "CLOCK_RATE"
    CLOCK_RESTARTS = "CLOCK_RESTARTS"
    CLOCK_JUMPS = "CLOCK_JUMPS"
    CLOCK_GAP = "CLOCK_GAP"
    CLOCK_MISSING = "CLOCK_MISSING"
    FRAME_COUNT = "FRAME_COUNT"
    DURATION = "DURATION"
    APPENDED = "APPENDED"
    STAMPS_WRONG = "STAMPS_WRONG"
    FPS_CLIPPED = "FPS_CLIPPED"
    SIZE_CHANGES = "SIZE_CHANGES"
    PIXEL_ASPECT = "PIXEL_ASPECT"
    ORIENTATION = "ORIENTATION"
    INTERLACED = "INTERLACED"
    FRAME_SHAPE = "FRAME_SHAPE"
    DAMAGED = "DAMAGED"
    TRUNCATED = "TRUNCATED"
    OPEN_ENDED = "OPEN_ENDED"


@dataclass(frozen=True, slots=True)
class VideoWarning:
    """What a user should know of a file that is taken all the same (``prefill.v1.VideoWarning``).

    Attributes:
        reason: for programs.
        message: a sentence for people, with the values it is about.
    """

    reason: WarningReason
    message: str


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The demuxed index of one video stream, in presentation order.

    Attributes:
        container: FFmpeg's name of the format.
        codec: FFmpeg's name of the codec.
        geometry: how large frames are and how they are shown.
        time_base: seconds per unit of ``pts``, as (numerator, denominator).
        pts: [frames] int64, ascending; frame ``i`` is the i-th in presentation order. In a file
            that is read serially they are the frames' numbers.
        keyframe: [frames] bool. All False if the file can only be read serially, by counting:
            its timestamps do not name its frames.
        times_s: [frames] float64, ascending from 0: when each frame is shown, in seconds. Where the
            clock of ``pts`` restarts or jumps, time goes on.
        fps: frames per second: the container's rate if it is true, else the average.
        duration_s: seconds to the end of the last frame.
        warnings: what of the file was not as its container says.
    """

    container: str
    codec: str
    geometry: Geometry
    time_base: tuple[int, int]
    pts: np.ndarray
    keyframe: np.ndarray
    times_s: np.ndarray
    fps: float
    duration_s: float
    warnings: tuple[VideoWarning, ...] = ()

    @property
    def width(self) -> int:
        """Pixels of a frame as it is shown."""
        return self.geometry.width

    @property
    def height(self) -> int:
        """Pixels of a frame as it is shown."""
        return self.geometry.height

    @property
    def frame_count(self) -> int:
        """Frames that can be decoded."""
        return len(self.pts)

    @property
    def keyframe_count(self) -> int:
        """Frames decoding can start at."""
        return int(self.keyframe.sum())

    def seconds_at(self, indices: np.ndarray) -> np.ndarray:
        """When frames are shown, [indices] float64 seconds after the first frame."""
        seconds: np.ndarray = self.times_s[indices]
        return seconds

    @property
    def stamp_error_s(self) -> float:
        """Most seconds that a frame's number over ``fps`` is off its time."""
        return stamp_error(self.times_s, self.fps)

    def save(self, path: Path) -> None:
        """Write as ``.npz``."""
        np.savez_compressed(
            path,
            pts=self.pts,
            keyframe=self.keyframe,
            times_s=self.times_s,
            geometry=np.array(json.dumps(self.geometry.to_dict())),
            time_base=np.array(self.time_base, np.int64),
            floats=np.array([self.fps, self.duration_s], np.float64),
            names=np.array([self.container, self.codec]),
            warnings=np.array([(w.reason, w.message) for w in self.warnings], np.str_),
        )

    @classmethod
    def load(cls, path: Path) -> VideoIndex:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as data:
            num, den = (int(v) for v in data["time_base"])
            fps, duration_s = (float(v) for v in data["floats"])
            container, codec = (str(v) for v in data["names"])
            return cls(
                container=container,
                codec=codec,
                geometry=Geometry.from_dict(json.loads(str(data["geometry"]))),
                time_base=(num, den),
                pts=data["pts"],
                keyframe=data["keyframe"],
                times_s=data["times_s"],
                fps=fps,
                duration_s=duration_s,
                warnings=warnings_from_pairs(data["warnings"].reshape(-1, 2)),
            )


def stamp_error(times_s: np.ndarray, fps: float) -> float:
    """Most seconds that ``number / fps`` is off the time of a frame."""
    return float(np.abs(np.arange(len(times_s)) / fps - times_s).max(initial=0.0))


def warnings_from_pairs(pairs: Iterable[Sequence[str]]) -> tuple[VideoWarning, ...]:
    """Warnings from (reason, message) pairs."""
    return tuple(VideoWarning(WarningReason(r), str(message)) for r, message in pairs)
