"""The clock alone, from arrays of timestamps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from prefill_service.video.decoder.timing.clock import Clock, measure_clock
from prefill_service.video.decoder.timing.timestamps import Declared, OtherStreams, Stamps
from prefill_service.video.index import WarningReason

NAN = float("nan")
CONSTANT = np.arange(50) / 25
TS = Declared(has_header=False, appendable=True)


def measure(
    times_s: Sequence[float] | np.ndarray,
    declared: Declared | None = None,
    others: OtherStreams | None = None,
    *,
    tick_s: float = 1 / 90000,
    keyframe_every: int = 1,
) -> Clock:
    times = np.asarray(times_s, np.float64)
    stamps = Stamps(
        times_s=times,
        keyframe=np.arange(len(times)) % keyframe_every == 0,
        durations_s=np.zeros(len(times)),
        tick_s=tick_s,
    )
    return measure_clock(stamps, declared or Declared(), others)


def reasons(clock: Clock) -> list[WarningReason]:
    return [warning.reason for warning in clock.warnings]


@pytest.mark.parametrize("rate", [24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60, 17])
def test_constant_rate_is_recognised_from_milliseconds(rate: float) -> None:
    times = np.round(np.arange(300) / rate, 3)
    for header in ((), (1000.0,), (5.0, 90000.0)):
        clock = measure(times, Declared(rates=header), tick_s=0.001)
        assert clock.fps == rate
        assert clock.duration_s == pytest.approx(300 / rate, abs=0.001)
        assert reasons(clock) == ([WarningReason.CLOCK_RATE] if header else [])


def test_a_declared_rate_stays_while_it_is_within_half_a_frame_everywhere() -> None:
    declared = Declared(rates=(29.97,))
    for rate, kept in ((29.97, True), (30000 / 1001, True), (30.0, False)):
        times = np.round(np.arange(1000) / rate, 3)
        assert (measure(times, declared, tick_s=0.001).fps == 29.97) == kept


def test_a_last_frame_that_comes_early_stays_where_it_is() -> None:
    times = np.append(CONSTANT, CONSTANT[-1] + 0.01)
    np.testing.assert_allclose(measure(times).times_s, times)


def test_the_last_frame_of_a_recording_that_slowed_down_is_shown_as_long_as_those_before() -> None:
    """A screen recording of 30 frames a second, then of one: its muxer writes 33 ms at the end."""
    times = np.append(np.arange(300) / 30, 10.0 + np.arange(20))
    ends = Declared(rates=(30.0,), durations_s=(29 + 1 / 30,))
    clock = measure(times, ends)
    assert clock.duration_s == pytest.approx(30.0)
    assert WarningReason.DURATION not in reasons(clock)
    slow = np.append(np.arange(300) / 30, 10.0 + np.arange(20) * 60)
    muxed = Declared(durations_s=(10 + 19 * 60 + 1 / 30,))  # within what the last frame is shown
    assert reasons(measure(slow, muxed)) == []
    early = Declared(durations_s=(10 + 17 * 60.0,))
    assert WarningReason.DURATION in reasons(measure(slow, early))


@pytest.mark.parametrize("parts", [2, 3, 20])
def test_restarts_are_recordings_that_follow_one_another(parts: int) -> None:
    clock = measure(np.tile(CONSTANT, parts))
    np.testing.assert_allclose(clock.times_s, np.arange(50 * parts) / 25)
    assert (clock.fps, clock.duration_s) == (25.0, pytest.approx(2 * parts))
    (warning,) = clock.warnings
    assert warning.reason is WarningReason.CLOCK_RESTARTS
    times = "once" if parts == 2 else f"{parts - 1} times"
    assert f"set back {times}, first at frame 50 (2.000 s) by 1.960 s" in warning.message


def test_a_frame_that_comes_late_behind_damage_is_no_restart() -> None:
    times = np.delete(CONSTANT, range(20, 35))
    times[22] = CONSTANT[19] + 0.02
    clock = measure(times)
    assert WarningReason.CLOCK_RESTARTS not in reasons(clock)
    others = np.arange(len(times)) != 22
    np.testing.assert_allclose(clock.times_s[others], times[others])
    assert times[21] < clock.times_s[22] < times[23]


@pytest.mark.parametrize("gap_s", [30.0, 600.0, 3000.0])
def test_a_pause_is_a_join_if_sound_pauses_too(gap_s: float) -> None:
    times = np.append(CONSTANT, CONSTANT + 2 + gap_s)
    silent = OtherStreams(times_s=times, packets=np.arange(100))
    sound_s = np.arange(0, times[-1], 0.1)
    packets = np.searchsorted(times, sound_s)
    sounding = OtherStreams(times_s=sound_s, packets=packets)
    joined = measure(times, TS, silent)
    assert reasons(joined) == [WarningReason.CLOCK_JUMPS]
    np.testing.assert_allclose(joined.times_s, np.arange(100) / 25)
    kept = measure(times, TS, sounding)
    assert reasons(kept) == [WarningReason.CLOCK_GAP]
    np.testing.assert_allclose(kept.times_s, times)


def test_a_pause_without_sound_is_a_join_only_between_regular_frames_and_at_a_keyframe() -> None:
    times = np.append(CONSTANT, CONSTANT + 100)
    irregular = np.append(np.cumsum(np.tile([0.04, 0.5, 1.0], 20)), CONSTANT + 100)
    assert reasons(measure(times, TS)) == [WarningReason.CLOCK_JUMPS]
    assert reasons(measure(times, TS, keyframe_every=45)) == [WarningReason.CLOCK_GAP]
    assert reasons(measure(irregular, TS)) == [WarningReason.CLOCK_GAP]
    assert reasons(measure(times)) == [WarningReason.CLOCK_GAP]  # not a format that is appended


def test_more_than_an_hour_is_a_join_in_any_format_unless_sound_goes_on() -> None:
    times = np.append(CONSTANT, CONSTANT + 5000)
    assert reasons(measure(times)) == [WarningReason.CLOCK_JUMPS]
    sound_s = np.arange(0, 5002, 0.5)
    sound = OtherStreams(times_s=sound_s, packets=np.searchsorted(times, sound_s))
    assert reasons(measure(times, others=sound)) == [WarningReason.CLOCK_GAP]


def test_repeated_missing_and_disordered_times_are_filled_in() -> None:
    times = CONSTANT.copy()
    times[7] = times[6]
    times[20] = NAN
    times[[30, 31]] = times[[31, 30]]
    clock = measure(times)
    np.testing.assert_allclose(clock.times_s, CONSTANT)
    (warning,) = clock.warnings
    assert warning.reason is WarningReason.CLOCK_MISSING
    assert warning.message.startswith("1 of 50 frames have no timestamp")


@pytest.mark.parametrize(("rates", "fps"), [((12.5,), 12.5), ((), 25.0), ((90000.0,), 25.0)])
def test_without_any_timestamp_the_declared_rate_is_taken_and_said(
    rates: tuple[float, ...], fps: float
) -> None:
    clock = measure(np.full(30, NAN), Declared(rates=rates))
    np.testing.assert_allclose(clock.times_s, np.arange(30) / fps)
    assert (clock.fps, clock.duration_s) == (fps, pytest.approx(30 / fps))
    assert WarningReason.CLOCK_MISSING in reasons(clock)


def test_what_is_declared_and_not_found_is_said() -> None:
    true = Declared(rates=(25.0,), frame_count=50, durations_s=(2.0,))
    assert reasons(measure(CONSTANT, true)) == []
    assert reasons(measure(CONSTANT, Declared(frame_count=90))) == [WarningReason.FRAME_COUNT]
    assert reasons(measure(CONSTANT, Declared(durations_s=(9.0,)))) == [WarningReason.DURATION]
    assert reasons(measure(CONSTANT, Declared(durations_s=(9.0, 2.0)))) == []  # sound is longer


def test_times_ascend_from_0_whatever_the_timestamps_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 40))
        times = rng.choice([0, 0.04, 0.08, 1, 50, 4000, 1e9, -1e9, NAN], count) + rng.choice([0, 1])
        clock = measure(times, TS if rng.random() < 0.5 else None)
        assert clock.times_s[0] == 0
        assert (np.diff(clock.times_s) > 0).all()
        assert np.isfinite(clock.times_s).all()
        assert 0 < clock.fps < float("inf")
        assert clock.times_s[-1] < clock.duration_s < float("inf")
