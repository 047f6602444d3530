"""Joins of recordings in one file, found from its clock.

* **Restarts.** Where time goes back by more than two steps, another recording begins. It is
  taken to follow the one before, whose last frame lasts a typical step of it.
* **Jumps.** A long step forward may be a frame that was shown long (a slide) or a join of two
  recordings. It is a *candidate* if it is longer than 10 s and than 10 times the median of the 16
  steps on either side: a recording of a frame every 10 s has none. A candidate is a join where
  - no other stream has samples in it, and it is longer than an hour; or
  - the next frame is a keyframe, the format can be joined by appending, and it is Matroska and
    this leads beyond the end that its header declares; or it is MPEG-TS or MPEG-PS and either
    the other streams have no samples in it or, without any, the frames before and after come at
    a regular rate.

  A join is re-based like a restart. Any other candidate stays, and is reported.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_service.video.decoder.timing.timestamps import (
    Declared,
    OtherStreams,
    Stamps,
    is_regular,
)
from prefill_service.video.index import VideoWarning, WarningReason

LONG_GAP_S = 10.0
"""Shorter pauses are taken for pauses."""

_HOUR_S = 3600.0
_GAP_RATIO = 10.0
_SIDE_STEPS = 16  # steps looked at on each side of a gap
_BACK_STEPS = 2.0  # time that goes back by less is disorder


@dataclass(frozen=True, slots=True)
class Joins:
    """Where the parts of a file begin, and the long steps that are no joins.

    Attributes:
        starts: [parts] int64, the first frame of each; the first is 0.
        restarts, jumps: frames whose time goes back, or too far ahead; both are joins.
        gaps: frames that come late, though of the same recording.
        steps: [frames] float64, seconds since the frame before by the file's own clock.
    """

    starts: np.ndarray
    restarts: np.ndarray
    jumps: np.ndarray
    gaps: np.ndarray
    steps: np.ndarray

    @classmethod
    def find(cls, stamps: Stamps, declared: Declared, others: OtherStreams, step: float) -> Joins:
        """Decide on every step of the file's clock."""
        known = np.flatnonzero(~np.isnan(stamps.times_s))
        values = stamps.times_s[known]
        steps = np.diff(values)
        restarts = known[1:][steps < -_BACK_STEPS * step]
        jumps: list[int] = []
        gaps: list[int] = []
        for position in _candidates(steps):
            evidence = _Evidence(stamps, declared, others, int(known[position + 1]))
            joined = evidence.is_join(values, steps, position)
            (jumps if joined else gaps).append(int(known[position + 1]))
        all_steps = np.zeros(len(stamps.times_s))
        all_steps[known[1:]] = steps
        return cls(
            starts=np.array(sorted({0, *restarts.tolist(), *jumps}), np.int64),
            restarts=restarts,
            jumps=np.array(jumps, np.int64),
            gaps=np.array(gaps, np.int64),
            steps=all_steps,
        )

    def describe(self, times_s: np.ndarray) -> list[VideoWarning]:
        """Warnings of what was found; ``times_s`` are the re-based times."""
        found = []
        if len(self.restarts):
            frame = int(self.restarts[0])
            found.append(
                VideoWarning(
                    WarningReason.CLOCK_RESTARTS,
                    f"the file's clock is set back {_times(self.restarts)}, first at frame {frame} "
                    f"({times_s[frame]:.3f} s) by {-self.steps[frame]:.3f} s: it is taken for "
                    "recordings that follow one another without a pause",
                )
            )
        if len(self.jumps):
            frame = int(self.jumps[0])
            found.append(
                VideoWarning(
                    WarningReason.CLOCK_JUMPS,
                    f"the file's clock jumps ahead {_times(self.jumps)}, first at frame {frame} "
                    f"({times_s[frame]:.3f} s) by {self.steps[frame]:.3f} s: it is taken for "
                    "recordings that follow one another without a pause",
                )
            )
        if len(self.gaps):
            frame = int(self.gaps[0])
            found.append(
                VideoWarning(
                    WarningReason.CLOCK_GAP,
                    f"the file has no frame for more than {LONG_GAP_S:g} s {_times(self.gaps)}, "
                    f"first for {self.steps[frame]:.3f} s before frame {frame} "
                    f"({times_s[frame]:.3f} s); the frame before is taken to be shown that long",
                )
            )
        return found


def _times(frames: np.ndarray) -> str:
    return "once" if len(frames) == 1 else f"{len(frames)} times"


def _candidates(steps: np.ndarray) -> list[int]:
    """Steps that are long beside their neighbours."""
    found = []
    for position in np.flatnonzero(steps > LONG_GAP_S):
        sides = [side for side in _sides(steps, position) if len(side)]
        if all(steps[position] > _GAP_RATIO * np.median(np.abs(side)) for side in sides):
            found.append(int(position))
    return found


def _sides(steps: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
    before = steps[max(0, position - _SIDE_STEPS) : position]
    return before, steps[position + 1 : position + 1 + _SIDE_STEPS]


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What tells a join from a pause, for one frame that comes late."""

    stamps: Stamps
    declared: Declared
    others: OtherStreams
    frame: int

    def is_join(self, values: np.ndarray, steps: np.ndarray, position: int) -> bool:
        """Whether ``frame``, at ``values[position + 1]``, begins another recording."""
        begin_s = float(values[position])
        end_s = float(values[position + 1])
        if self.others.has_samples(self.frame, begin_s, end_s):
            return False
        if end_s - begin_s > _HOUR_S:
            return True
        if not self.declared.appendable or not self._is_keyframe():
            return False
        if self.declared.has_header:
            ends = self.declared.durations_s
            return bool(ends) and end_s > max(ends) + 1
        return bool(len(self.others.times_s)) or all(map(is_regular, _sides(steps, position)))

    def _is_keyframe(self) -> bool:
        """Flags are in the order of decoding where the file is read serially."""
        near = self.stamps.keyframe[max(0, self.frame - 1) : self.frame + 4]
        return bool(near.any())
