"""Chunks of long questions by time: on a simulated machine whose steps cost what they compute."""

from __future__ import annotations

import pytest

from prefill_service.kv.vllm_connector.prefill_pacer import Prefill, PrefillPacer, StepLimits

STEP_S = 0.1
SHARE = 1 / 3
LINEAR = 500.0
BASE_S = 0.02
"""Of a step in which others decode."""


class Machine:
    """Takes what a step computes times a constant, which the pacer does not know."""

    def __init__(self, unit_s: float) -> None:
        self.pacer = PrefillPacer(STEP_S, SHARE, LINEAR)
        self.unit_s = unit_s

    def decode(self) -> None:
        self.pacer.learn(BASE_S, 0.0, decoding=1)

    def take_in(self, prefill: Prefill, decoding: int) -> float:
        """One step that takes in what the pacer allows; returns the prefill's seconds."""
        limits = self.pacer.limit_step([prefill], [], decoding)
        tokens = min(prefill.tokens, limits.request_tokens)
        work = self.pacer.work(prefill, tokens)
        seconds = work * self.unit_s
        self.pacer.learn(seconds + (BASE_S if decoding else 0.0), work, decoding)
        return seconds


@pytest.mark.parametrize("context", [0, 3_000, 80_000])
@pytest.mark.parametrize("unit_s", [1e-7, 1e-9])
def test_chunks_get_their_time_whatever_they_cost(context: int, unit_s: float) -> None:
    machine = Machine(unit_s)
    machine.decode()
    prefill = Prefill(context, 1 << 30)
    for _ in range(30):
        machine.take_in(prefill, decoding=0)
    one_token = (context + LINEAR) * unit_s
    assert machine.take_in(prefill, decoding=0) == pytest.approx(STEP_S, abs=one_token, rel=0.2)
    beside = BASE_S * SHARE / (1 - SHARE)
    seconds = machine.take_in(prefill, decoding=3)
    assert seconds == pytest.approx(max(beside, one_token), abs=one_token, rel=0.2)


def test_a_chunk_shrinks_as_its_context_grows() -> None:
    machine = Machine(1e-8)
    for _ in range(30):
        machine.take_in(Prefill(1000, 1 << 30), decoding=0)
    sizes = [
        machine.pacer.limit_step([Prefill(context, 1 << 30)], [], 0).request_tokens
        for context in (1000, 10_000, 100_000)
    ]
    assert sizes[0] > 3 * sizes[1] > 9 * sizes[2] > 0


def test_several_long_ones_share_one_chunk() -> None:
    machine = Machine(1e-8)
    long = Prefill(5000, 1 << 20)
    for _ in range(30):
        machine.take_in(long, decoding=0)
    alone = machine.pacer.limit_step([long], [], 0)
    four = machine.pacer.limit_step([long] * 3, [long], 0)
    assert alone.step_tokens == alone.request_tokens
    assert four.request_tokens == alone.request_tokens // 4
    assert four.step_tokens == 4 * four.request_tokens


def test_a_short_question_is_taken_in_whole_and_long_ones_wait_for_it() -> None:
    machine = Machine(1e-8)
    long = Prefill(5000, 1 << 20)
    for _ in range(30):
        machine.take_in(long, decoding=0)
    short = Prefill(5000, 40)
    limits = machine.pacer.limit_step([long], [short], 2)
    assert limits.withhold_long
    assert limits.request_tokens >= short.tokens
    # but not for ever
    seen = [machine.pacer.limit_step([long], [short], 2).withhold_long for _ in range(20)]
    assert 2 <= seen.count(False) <= 10


def test_without_long_questions_nothing_is_bounded() -> None:
    machine = Machine(1e-8)
    machine.take_in(Prefill(5000, 100), decoding=0)
    limits = machine.pacer.limit_step([Prefill(5000, 50)], [Prefill(0, 70)], 4)
    assert limits == StepLimits(request_tokens=70)
    assert machine.pacer.limit_step([], [], 4) == StepLimits(request_tokens=1)


def test_before_anything_is_measured_chunks_are_small() -> None:
    limits = PrefillPacer(STEP_S, SHARE, LINEAR).limit_step([Prefill(0, 10_000)], [], 1)
    assert 1 <= limits.request_tokens < 64
