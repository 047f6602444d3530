"""The index of a video: its frames' times and keyframes, found without decoding it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """The demuxed index of one video stream, in presentation order.

    Attributes:
        container: FFmpeg's name of the format.
        codec: FFmpeg's name of the codec.
        width, height: pixels of a decoded frame, after rotation.
        rotation: degrees (0, 90, 180, 270) a decoded frame must be turned counter-clockwise.
        time_base: seconds per unit of ``pts``, as (numerator, denominator).
        pts: [frames] int64, ascending; frame ``i`` is the i-th in presentation order.
        keyframe: [frames] bool. All False if the file can only be read serially, by counting:
            its timestamps do not name its frames.
        fps: average frame rate, frames per second.
        duration_s: duration of the stream, seconds.
    """

    container: str
    codec: str
    width: int
    height: int
    rotation: int
    time_base: tuple[int, int]
    pts: np.ndarray
    keyframe: np.ndarray
    fps: float
    duration_s: float

    @property
    def frame_count(self) -> int:
        """Frames that can be decoded."""
        return len(self.pts)

    @property
    def keyframe_count(self) -> int:
        """Frames decoding can start at."""
        return int(self.keyframe.sum())

    def save(self, path: Path) -> None:
        """Write as ``.npz``."""
        np.savez_compressed(
            path,
            pts=self.pts,
            keyframe=self.keyframe,
            ints=np.array([self.width, self.height, self.rotation, *self.time_base], np.int64),
            floats=np.array([self.fps, self.duration_s], np.float64),
            names=np.array([self.container, self.codec]),
        )

    @classmethod
    def load(cls, path: Path) -> VideoIndex:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as data:
            width, height, rotation, num, den = (int(v) for v in data["ints"])
            fps, duration_s = (float(v) for v in data["floats"])
            container, codec = (str(v) for v in data["names"])
            return cls(
                container=container,
                codec=codec,
                width=width,
                height=height,
                rotation=rotation,
                time_base=(num, den),
                pts=data["pts"],
                keyframe=data["keyframe"],
                fps=fps,
                duration_s=duration_s,
            )
