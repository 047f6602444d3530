"""Agreement of ranks: what one integer says, and how often it is exchanged."""

from __future__ import annotations

import itertools
import time

import pytest

from prefill_service.engine.agreement import (
    INTERVAL_MS,
    MAX_LAYER_MS,
    CollectiveStatus,
    SyncInterval,
    pack_status,
    unpack_status,
)

RUNNING, CANCELLED, FAILED = CollectiveStatus


def agree(*ranks: tuple[CollectiveStatus, bool, int]) -> tuple[CollectiveStatus, bool, int]:
    return unpack_status(max(pack_status(*rank) for rank in ranks))


def test_what_a_single_rank_says_is_what_it_learns() -> None:
    for rank in itertools.product(CollectiveStatus, (True, False), (0, 7, MAX_LAYER_MS)):
        assert agree(rank) == rank


def test_the_gravest_status_of_all_ranks_wins_whatever_else_they_say() -> None:
    status, _, _ = agree((RUNNING, False, MAX_LAYER_MS), (CANCELLED, True, 0))
    assert status is CANCELLED
    status, _, _ = agree((CANCELLED, False, MAX_LAYER_MS), (FAILED, True, 0))
    assert status is FAILED


def test_a_task_is_paused_only_if_all_of_its_ranks_can() -> None:
    assert agree((RUNNING, True, 3), (RUNNING, True, 5)) == (RUNNING, True, 5)
    _, can_pause, _ = agree((RUNNING, True, MAX_LAYER_MS), (RUNNING, False, 0))
    assert not can_pause


def test_ranks_that_say_the_same_learn_the_slowest_ones_time_per_layer() -> None:
    assert agree((RUNNING, False, 3), (RUNNING, False, 40)) == (RUNNING, False, 40)
    # Beyond its bits a time is cut off, and does not change what the others mean.
    assert agree((RUNNING, True, 10 * MAX_LAYER_MS)) == (RUNNING, True, MAX_LAYER_MS)


def test_agreement_before_every_layer_until_a_time_is_known() -> None:
    interval = SyncInterval()
    assert [interval.count_layer() for _ in range(3)] == [True, True, True]
    interval.restart(0)  # nobody had a layer yet
    assert interval.count_layer()


@pytest.mark.parametrize(
    ("layer_ms", "every"), [(1, INTERVAL_MS), (INTERVAL_MS // 5, 5), (5000, 1)]
)
def test_agreement_about_four_times_a_second(layer_ms: int, every: int) -> None:
    interval = SyncInterval()
    interval.restart(layer_ms)
    assert [interval.count_layer() for _ in range(every)] == [False] * (every - 1) + [True]
    assert interval.count_layer()  # overdue until it was made
    interval.restart(layer_ms)
    assert interval.count_layer() == (every == 1)


def test_a_layer_is_timed_since_the_last_agreement() -> None:
    interval = SyncInterval()
    assert interval.layer_ms == 0
    interval.count_layer()
    interval.count_layer()
    time.sleep(0.1)
    assert interval.layer_ms >= 50
    interval.restart(7)
    assert interval.layer_ms == 0
