"""Agreements inside a chunk: by the clock, counted in layers, equally on every rank."""

from __future__ import annotations

import time

import pytest

from prefill_service.engine.agreement import EVERY_MS, SyncInterval


def test_every_layer_until_a_time_is_known() -> None:
    cadence = SyncInterval()
    assert [cadence.due() for _ in range(3)] == [True, True, True]
    cadence.agreed(0)  # nobody had a layer yet
    assert cadence.due()


@pytest.mark.parametrize(("layer_ms", "every"), [(1, EVERY_MS), (EVERY_MS // 5, 5), (5000, 1)])
def test_about_four_times_a_second(layer_ms: int, every: int) -> None:
    cadence = SyncInterval()
    cadence.agreed(layer_ms)
    assert [cadence.due() for _ in range(every)] == [False] * (every - 1) + [True]
    assert cadence.due()  # overdue until it was made
    cadence.agreed(layer_ms)
    assert cadence.due() == (every == 1)


def test_a_layer_is_timed_since_the_last_agreement() -> None:
    cadence = SyncInterval()
    assert cadence.layer_ms == 0
    cadence.due()
    cadence.due()
    time.sleep(0.1)
    assert cadence.layer_ms >= 50
    cadence.agreed(7)
    assert cadence.layer_ms == 0
