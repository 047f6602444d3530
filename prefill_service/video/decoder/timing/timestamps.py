"""Timestamps of a video's frames, what the container declares of them, and steps of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_REGULAR_STEPS = 8  # fewer of them do not make a rate
_NEAR_PACKETS = 64  # how far containers interleave streams
_MAX_RATE = 1000.0


@dataclass(frozen=True, slots=True)
class Declared:
    """What a container declares of its video stream.

    Attributes:
        rates: frames per second, the one that other readers take first; those that are known.
        frame_count: 0 if it is not declared.
        durations_s: of the stream and of the file; none where they are FFmpeg's estimates.
        has_header: whether a header, once for the file, says how long it is.
        appendable: whether files of this format are joined by appending one to another.
    """

    rates: tuple[float, ...] = ()
    frame_count: int = 0
    durations_s: tuple[float, ...] = ()
    has_header: bool = True
    appendable: bool = False


@dataclass(frozen=True, slots=True)
class OtherStreams:
    """Samples of streams that are not the video's.

    Attributes:
        times_s: [samples] float64, from the time that is 0 in ``Stamps``.
        packets: [samples] int64, ascending: how many of the video's packets precede each in the
            file.
    """

    times_s: np.ndarray = field(default_factory=lambda: np.empty(0))
    packets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def has_samples(self, packet: int, begin_s: float, end_s: float) -> bool:
        """Whether there are samples of this time near a packet, a second of play left out."""
        ends = (packet - _NEAR_PACKETS, packet + _NEAR_PACKETS)
        times_s = self.times_s[slice(*np.searchsorted(self.packets, ends))]
        return bool(((times_s > begin_s + 1) & (times_s < end_s - 1)).any())


@dataclass(frozen=True, slots=True)
class Stamps:
    """Timestamps of the frames, in the order in which a decoder shows them.

    Attributes:
        times_s: [frames] float64, the first known one is 0; nan where there is none.
        keyframe: [frames] bool.
        durations_s: [frames] float64, as the packets have them; 0 where they have none.
        tick_s: the unit that they are rounded to.
        start_s: what the file's clock shows at the first one.
    """

    times_s: np.ndarray
    keyframe: np.ndarray
    durations_s: np.ndarray
    tick_s: float
    start_s: float = 0.0


def typical_step(steps: np.ndarray) -> float:
    """Mean of the steps that are near their median: the median, freed of its rounding."""
    median = float(np.quantile(steps, 0.5, method="lower"))  # one of them, so that one is near
    return float(steps[_near(steps, median)].mean())


def _near(steps: np.ndarray, middle: float) -> np.ndarray:
    near: np.ndarray = np.abs(steps - middle) <= middle / 2
    return near


def is_regular(steps: np.ndarray) -> bool:
    """Whether most steps are about equal."""
    if len(steps) < _REGULAR_STEPS or (middle := float(np.median(steps))) <= 0:
        return False
    return bool(_near(steps, middle).mean() >= 0.8)


def plausible(rates: tuple[float, ...]) -> list[float]:
    """Rates that a video can have, in frames per second."""
    return [rate for rate in rates if 0 < rate <= _MAX_RATE]


def as_floats(times: Sequence[int | None]) -> np.ndarray:
    """[times] float64, nan where there is none."""
    return np.array([np.nan if time is None else time for time in times], np.float64)
