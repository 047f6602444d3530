"""The frames at a constant rate that a processor is told to sample from.

Processors, and vLLM, count frames and divide by a rate: they know no other times. Of a file whose
rate varies, frames by number are bunched where it is fast, and their stamps are wrong. By time,
the processor's rule is applied to the file as though it had been converted to a constant rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_service.models.prefix_plan import SampleBy
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

VARIABLE_S = 0.5
"""Files whose ``stamp_error_s`` is larger are sampled by time unless the request says otherwise:
half of what a temporal patch of two frames at 2 frames a second lasts."""

_LEAST_RATE = 10.0
_LARGEST_RATE = 120.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """A file as frames at a constant rate, numbered from 0.

    Attributes:
        index: of the file.
        by: FRAME: they are the file's own. TIME: each is the file's frame that is shown then.
        frame_count: how many there are.
        fps: their rate.
    """

    index: VideoIndex
    by: SampleBy
    frame_count: int
    fps: float

    @classmethod
    def choose(cls, index: VideoIndex, by: SampleBy | None) -> Timeline:
        """The timeline of a file as asked, or (None) as its rate demands.

        Where a frame's number over the rate is within half a frame of its time, frames by time
        are those by number.
        """
        varies = index.stamp_error_s > VARIABLE_S
        wanted = by or (SampleBy.TIME if varies else SampleBy.FRAME)
        if wanted is SampleBy.FRAME or index.stamp_error_s <= 0.5 / index.fps:
            return cls(index, wanted, index.frame_count, index.fps)
        fast = float(np.quantile(np.diff(index.times_s), 0.1))
        fps = min(max(float(round(1 / fast)), _LEAST_RATE), _LARGEST_RATE)
        return cls(index, SampleBy.TIME, max(1, round(index.duration_s * fps)), fps)

    @property
    def _renumbers(self) -> bool:
        return self.fps != self.index.fps or self.frame_count != self.index.frame_count

    def frames(self, numbers: np.ndarray) -> np.ndarray:
        """The file's frames of these numbers, [numbers] int64."""
        if not self._renumbers:
            return numbers.astype(np.int64)
        begun = np.searchsorted(self.index.times_s, (numbers + 0.5) / self.fps, side="right")
        return np.asarray(begun - 1, np.int64)

    def seconds(self, numbers: np.ndarray) -> np.ndarray:
        """When these are shown, [numbers] float64 seconds after the first frame."""
        if self._renumbers:
            return np.asarray(numbers / self.fps, np.float64)
        return self.index.seconds_at(numbers)

    def warn(self, numbers: np.ndarray) -> tuple[VideoWarning, ...]:
        """Whether the stamps of these numbers are wrong."""
        off_s = float(np.abs(numbers / self.fps - self.seconds(numbers)).max(initial=0.0))
        if off_s <= VARIABLE_S:
            return ()
        message = (
            f"the file's frame rate varies: sampled by frame, frames are stamped up to {off_s:.1f} "
            "s off the time they are shown at; sampling.by = TIME gives true stamps"
        )
        return (VideoWarning(WarningReason.STAMPS_WRONG, message),)
