"""The clock of a video: when each frame is shown, measured from the timestamps of its frames.

A container's own rate is a header value (Matroska, WebM) or an estimate from the first packets
(MPEG-TS), so timestamps come first:

* **Order.** Frames come in the order in which a decoder shows them. Within a part of the file
  their timestamps are sorted; missing and repeated ones are interpolated.
* **Joins.** Recordings that were joined follow one another: time goes on where the clock of a part
  restarts or jumps (``joins`` says what tells a join from a pause).
* **Rate.** The container's rate is kept where ``number / rate`` is within half a frame of the
  time of every frame, so that number and rate are those that other readers see. Else a standard
  rate is taken which the timestamps follow to their rounding; else frames over duration.
* **Contradictions** of what the container declares and what was measured become warnings.

All times are float64 seconds; nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prefill_service.video.decoder.timing.joins import Joins
from prefill_service.video.decoder.timing.timestamps import (
    Declared,
    OtherStreams,
    Stamps,
    is_regular,
    plausible,
    typical_step,
)
from prefill_service.video.index import VideoWarning, WarningReason, stamp_error

_FALLBACK_RATE = 25.0  # FFmpeg's own, for a stream without any clock
_LAST_STEPS = 16
_MAX_STRAYS = 4
_STANDARD_RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 48.0, 50.0, 60000 / 1001, 60.0,
                   120000 / 1001, 120.0)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Clock:
    """When the frames of a video are shown.

    Attributes:
        times_s: [frames] float64, ascending from 0.
        fps: the rate that other readers see, if it is true; else frames over duration.
        duration_s: up to the end of the last frame.
        warnings: what was contradictory.
    """

    times_s: np.ndarray
    fps: float
    duration_s: float
    warnings: tuple[VideoWarning, ...]


def measure_clock(
    stamps: Stamps, declared: Declared, others: OtherStreams | None = None, hidden: int = 0
) -> Clock:
    """The clock that the timestamps of one or more frames show.

    Args:
        others: the file's other streams.
        hidden: frames that the container declares and says not to show.
    """
    warnings: list[VideoWarning] = []
    count = len(stamps.times_s)
    missing = int(np.isnan(stamps.times_s).sum())
    step = _global_step(stamps, declared)
    if missing:
        warnings.append(_missing(missing, count, step, declared))
    stamps = replace(stamps, times_s=_without_strays(stamps.times_s, step))
    joins = Joins.find(stamps, declared, others or OtherStreams(), step)
    times_s = _rebase(stamps.times_s, joins.starts, step)
    warnings += joins.describe(times_s)
    last_s = _last_duration(stamps, times_s, joins.starts, step)
    duration_s = float(times_s[-1]) + last_s
    fps = _choose_rate(times_s, duration_s, declared, stamps.tick_s)
    warnings += _contradictions(
        count,
        (float(times_s[-1]), duration_s),
        _relative(declared, stamps, hidden),
        joined=len(joins.starts) > 1 or missing == count,
    )
    return Clock(times_s, fps, duration_s, tuple(warnings))


# ---- steps ---------------------------------------------------------------------------------


def _global_step(stamps: Stamps, declared: Declared) -> float:
    """Seconds that a frame typically lasts, also where hardly a frame has a timestamp."""
    known = stamps.times_s[~np.isnan(stamps.times_s)]
    steps = np.diff(known)
    steps = steps[steps > 0]
    if len(steps):
        return typical_step(steps)
    duration = float(stamps.durations_s.max(initial=0.0))
    if duration > 0:
        return duration
    return 1 / next(iter(plausible(declared.rates)), _FALLBACK_RATE)


def _without_strays(times_s: np.ndarray, step: float) -> np.ndarray:
    """The times, nan of a few frames that come late between others: damage, and no restart."""
    known = np.flatnonzero(~np.isnan(times_s))
    values = times_s[known]
    mended = times_s.copy()
    for back in np.flatnonzero(np.diff(values) < -2 * step) + 1:
        ahead = values[back : back + _MAX_STRAYS + 1]
        passing = np.flatnonzero(ahead > values[back - 1])
        if len(passing) and ahead[passing[0]] - ahead[passing[0] - 1] > 2 * step:
            mended[known[back : back + int(passing[0])]] = np.nan
    return mended


def _rebase(times_s: np.ndarray, starts: np.ndarray, step: float) -> np.ndarray:
    """[frames] float64 from 0, ascending: the parts one after another."""
    parts: list[np.ndarray] = []
    begin = 0.0
    for part in np.split(times_s, starts[1:]):
        own = _fill(part, step)
        if len(parts) + 1 < len(starts):
            own = _mend_end(own)
        steps = np.diff(own)
        parts.append(begin + own - own[0])
        begin = float(parts[-1][-1]) + (typical_step(steps) if len(steps) else step)
    return np.concatenate(parts)


def _mend_end(times_s: np.ndarray) -> np.ndarray:
    """Times of a part before a join, the last put right where all others come at a constant rate.

    Where files were appended, FFmpeg may give the last frame of one a time between both clocks.
    """
    steps = np.diff(times_s)
    if not is_regular(steps[:-1]):
        return times_s
    step = typical_step(steps[:-1])
    if np.abs(steps[:-1] - step).max() > step / 10 or steps[-1] >= 0.75 * step:
        return times_s
    return np.append(times_s[:-1], times_s[-2] + step)


def _fill(times_s: np.ndarray, step: float) -> np.ndarray:
    """[frames] float64, strictly ascending: sorted, with missing and repeated times filled in."""
    known = np.flatnonzero(~np.isnan(times_s))
    if not len(known):
        return np.arange(len(times_s)) * step
    values = np.sort(times_s[known])
    distinct = np.concatenate(([True], np.diff(values) > 0))
    known = known[distinct]
    values = values[distinct]
    if len(values) > 1:
        step = typical_step(np.diff(values))
    frames = np.arange(len(times_s))
    filled: np.ndarray = np.interp(frames, known, values)
    filled += step * (np.maximum(frames - known[-1], 0) + np.minimum(frames - known[0], 0))
    return filled


# ---- duration and rate ---------------------------------------------------------------------


def _last_duration(stamps: Stamps, times_s: np.ndarray, starts: np.ndarray, step: float) -> float:
    """Seconds that the last frame is shown: as its packet says, if that is likely.

    Most containers write the length of a frame of the nominal rate there. One that is far from a
    typical step counts only among frames that come irregularly and whose packets are right. Where
    the last steps are regular, theirs is typical: a recording may have slowed down.
    """
    own = float(stamps.durations_s[-1])
    steps = np.diff(times_s[starts[-1] :])
    if not len(steps):
        return own if own > 0 and len(times_s) == 1 else step
    last_steps = steps[-_LAST_STEPS:]
    usual = typical_step(last_steps if is_regular(last_steps) else steps)
    if usual / 2 <= own <= usual * 1.5:
        return own
    right = np.abs(stamps.durations_s[:-1] - np.diff(times_s)) <= 2 * stamps.tick_s
    if own > usual and right.mean() > 0.9 and not is_regular(steps):
        return own
    return usual


def _choose_rate(
    times_s: np.ndarray, duration_s: float, declared: Declared, tick_s: float
) -> float:
    """Frames per second, see the module's docstring."""
    count = len(times_s)
    average = count / duration_s
    if count == 1:
        return next(iter(plausible(declared.rates)), average)
    step = typical_step(np.diff(times_s))
    for rate in plausible(declared.rates):
        if stamp_error(times_s, rate) <= step / 2 + tick_s:
            return rate
    rounded = [*_STANDARD_RATES, max(1.0, float(round(average)))]
    best = min(rounded, key=lambda rate: stamp_error(times_s, rate))
    return best if stamp_error(times_s, best) <= 1.5 * tick_s else average


# ---- contradictions ------------------------------------------------------------------------


def _missing(missing: int, count: int, step: float, declared: Declared) -> VideoWarning:
    how = "the times between them are interpolated"
    if missing == count:
        source = "the container's" if plausible(declared.rates) else "an assumed"
        how = f"{source} rate of {1 / step:g} frames a second is taken"
    return VideoWarning(
        WarningReason.CLOCK_MISSING, f"{missing} of {count} frames have no timestamp: {how}"
    )


def _relative(declared: Declared, stamps: Stamps, hidden: int) -> Declared:
    """What is declared of the frames that are shown; some durations count from time 0."""
    start = stamps.start_s
    ends = declared.durations_s
    return replace(
        declared,
        frame_count=max(0, declared.frame_count - hidden),
        durations_s=(*ends, *(end - start for end in ends if start > 0)),
    )


def _contradictions(
    count: int, last_s: tuple[float, float], declared: Declared, *, joined: bool
) -> list[VideoWarning]:
    """Warnings of declared values that are not the measured ones.

    Args:
        last_s: when the last of ``count`` frames begins and ends.
    """
    found = []
    begin_s, duration_s = last_s
    tolerance = max(1.0, 0.05 * duration_s)
    rate = next(iter(plausible(declared.rates)), 0.0)
    if rate > 0 and abs(count / rate - duration_s) > tolerance:
        found.append(
            VideoWarning(
                WarningReason.CLOCK_RATE,
                f"the container's rate is {rate:g} frames a second, but its {count} frames last "
                f"{duration_s:.3f} s, which is {count / duration_s:.3f} a second: the times of the "
                "frames are used",
            )
        )
    listed = declared.frame_count
    if listed and abs(listed - count) > max(2, 0.01 * listed):
        found.append(
            VideoWarning(
                WarningReason.FRAME_COUNT,
                f"the container declares {listed} frames, {count} were found: these are used",
            )
        )
    ends = declared.durations_s
    within = (begin_s - tolerance, duration_s + tolerance)
    if ends and not joined and not any(within[0] <= end <= within[1] for end in ends):
        found.append(
            VideoWarning(
                WarningReason.DURATION,
                f"the container declares {ends[0]:.3f} s, its frames last {duration_s:.3f} s: "
                "the times of the frames are used",
            )
        )
    return found
