"""Degree, place, order and preemption; and that nobody starves, whoever comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from prefill_service.scheduling.placement import (
    MAX_BYPASSES,
    MAX_PREEMPTED,
    PREEMPT_RATIO,
    Active,
    Placement,
    Placer,
    Waiting,
    assumed_seconds,
)

CHUNK = 512
ALL = Subgroup(0, 4)


class Capacity:
    """``tokens`` on each rank, with an exchange that divides them; of two prefixes if ``two``."""

    def __init__(self, tokens: int = 1 << 30, two: bool = True) -> None:
        self.tokens = tokens
        self.two = two

    def fits(self, tokens: int, subgroup: Subgroup) -> bool:
        return tokens <= self.tokens * subgroup.size

    def fit_together(
        self, preempted: tuple[int, Subgroup], preempting: tuple[int, Subgroup]
    ) -> bool:
        return self.two


def placer(ranks: int = 4, capacity: Capacity | None = None, preemption: bool = True) -> Placer:
    return Placer(form_subgroups(ranks), CHUNK, capacity or Capacity(), preemption=preemption)


def queue(*tokens: int) -> list[Waiting]:
    return [Waiting(f"{number}", count) for number, count in enumerate(tokens)]


def subgroups(placed: Sequence[Placement]) -> list[Subgroup]:
    return [placement.subgroup for placement in placed]


def test_a_job_that_needs_certain_ranks_has_them_or_waits() -> None:
    pair = Subgroup(2, 2)
    job = Waiting("text", 100, subgroup=pair)
    assert subgroups(placer().place_jobs([job], [])) == [pair]
    others = Active("video", 100, 100, Subgroup(0, 2))
    assert subgroups(placer().place_jobs([job], [others])) == [pair]
    theirs = Active("video", 100, 100, Subgroup(2, 1))
    assert placer().place_jobs([job], [theirs]) == []
    long = Active("long", 100_000, 100_000, ALL)
    assert placer().place_jobs([job], [long]) == [Placement("text", pair, preempts="long")]


@pytest.mark.parametrize("tokens", [10, 100_000])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_alone_it_has_all_ranks(ranks: int, tokens: int) -> None:
    assert subgroups(placer(ranks).place_jobs(queue(tokens), [])) == [Subgroup(0, ranks)]


def test_several_at_once_on_subgroups_of_several_sizes() -> None:
    placed = placer().place_jobs(queue(2 * CHUNK, CHUNK, CHUNK), [])
    assert subgroups(placed) == [Subgroup(0, 2), Subgroup(2, 1), Subgroup(3, 1)]
    assert not any(placement.preempts for placement in placed)


def test_long_ones_go_one_after_the_other_until_the_queue_is_long() -> None:
    place = placer()
    degrees = {waiting: place.choose_degree(100 * CHUNK, waiting, 100) for waiting in (1, 2, 8, 40)}
    assert degrees == {1: 4, 2: 4, 8: 2, 40: 1}
    assert subgroups(place.place_jobs(queue(100 * CHUNK, 100 * CHUNK), [])) == [ALL]


def test_the_degree_is_the_best_of_all() -> None:
    """Brute force: the mean end of W equal jobs, dealt to the subgroups of one size in turn."""
    for ranks in (1, 2, 3, 4, 5, 8):
        place = placer(ranks)
        family = form_subgroups(ranks)
        for waiting in range(1, 25):
            means = {}
            for size in {subgroup.size for subgroup in family}:
                count = sum(subgroup.size == size for subgroup in family)
                ends = [
                    (number // count + 1) * assumed_seconds(10_000, size)
                    for number in range(-(-waiting // count) * count)
                ]
                means[size] = sum(ends) / len(ends)
            chosen = place.choose_degree(10_000, waiting, ranks)
            assert means[chosen] == pytest.approx(min(means.values()))


def test_fewer_ranks_now_or_more_later_whichever_ends_first() -> None:
    tokens = 100 * CHUNK
    for left, expected in ((CHUNK, []), (90 * CHUNK, [Subgroup(2, 2)])):
        at_work = Active("a", tokens, left, Subgroup(0, 2), preemptible=False)
        assert subgroups(placer().place_jobs([Waiting("b", tokens)], [at_work])) == expected


def test_one_behind_begins_if_it_is_in_nobodys_way() -> None:
    """The first one in the queue waits for all ranks, half of which are free for 10 chunks."""
    at_work = Active("a", 40 * CHUNK, 10 * CHUNK, Subgroup(0, 2), preemptible=False)
    first = Waiting("b", 400 * CHUNK)
    assert placer().place_jobs([first], [at_work]) == []
    small = Waiting("c", 4 * CHUNK)
    large = Waiting("d", 30 * CHUNK)
    placed = placer().place_jobs([first, large, small], [at_work])
    assert [p.job_id for p in placed] == ["c"]
    tired = replace(first, bypassed=MAX_BYPASSES)
    assert placer().place_jobs([tired, large, small], [at_work]) == []


def test_a_prefix_has_as_many_ranks_as_its_kv_needs() -> None:
    tight = placer(capacity=Capacity(CHUNK))
    assert subgroups(tight.place_jobs(queue(CHUNK, CHUNK + 1), [])) == [
        Subgroup(0, 1),
        Subgroup(2, 2),
    ]
    assert subgroups(tight.place_jobs(queue(3 * CHUNK, *[CHUNK] * 40), [])) == [ALL]
    assert subgroups(tight.place_jobs(queue(9 * CHUNK, 8 * CHUNK), [])) == [
        ALL
    ]  # which will refuse it


def test_who_preempts() -> None:
    long = Active("long", 40 * CHUNK, 20 * CHUNK, ALL)
    short = Waiting("short", 20 * CHUNK // PREEMPT_RATIO)
    (placed,) = placer().place_jobs([short], [long])
    assert (placed.preempts, placed.subgroup) == ("long", ALL)  # whose other ranks would only wait
    two = placer().place_jobs(queue(CHUNK, CHUNK), [long])
    assert [p.preempts for p in two] == ["long"]  # the second one in the next pause
    for waiting, active in [
        (Waiting("not so short", short.tokens + 1), long),
        (
            short,
            replace(long, preempted_tokens=int(MAX_PREEMPTED * long.tokens) - short.tokens + 1),
        ),
        (short, replace(long, preemptible=False)),
        (short, replace(long, preempts="another")),
    ]:
        assert placer().place_jobs([waiting], [active]) == []
    assert placer(capacity=Capacity(two=False)).place_jobs([short], [long]) == []
    assert placer(preemption=False).place_jobs([short], [long]) == []


def test_many_short_ones_share_a_pause() -> None:
    """Sixteen that wait are done soonest side by side."""
    long = Active("long", 400 * CHUNK, 400 * CHUNK, ALL)
    placed = placer().place_jobs(queue(*[CHUNK] * 16), [long])
    assert len(placed) > 1
    assert {p.preempts for p in placed} == {"long"}
    assert sum(p.subgroup.size for p in placed) == 4


def test_a_baseline_has_all_ranks_or_waits() -> None:
    one = Waiting("one", CHUNK, all_ranks=True)
    busy = Active("a", 4 * CHUNK, 3 * CHUNK, Subgroup(0, 1))
    assert placer().place_jobs([one], [busy]) == []
    assert subgroups(placer().place_jobs([one, Waiting("b", CHUNK)], [])) == [ALL]
    (placed,) = placer().place_jobs([one], [Active("a", 40 * CHUNK, 30 * CHUNK, ALL)])
    assert (placed.subgroup, placed.preempts) == (ALL, "a")


@pytest.mark.parametrize("seed", range(6))
def test_nobody_starves(seed: int) -> None:
    """Short jobs without end, and some long ones: each begins and ends, within its bounds."""
    chance = random.Random(seed)
    ranks = random.Random(seed).choice([1, 2, 3, 4, 8])
    place = placer(ranks)
    clock = 0.0
    number = 0
    waiting: list[Waiting] = []
    active: dict[str, Active] = {}
    bypassed: dict[str, int] = {}
    while number < 120 or waiting or active:
        for _ in range(chance.choice([0, 1, 3]) if number < 120 else 0):
            tokens = chance.choice([100, 600, 2_000, 60_000])
            waiting.append(Waiting(f"{number}", tokens, chance.random() < 0.05))
            number += 1
        for placed in place.place_jobs(waiting, list(active.values())):
            job = next(w for w in waiting if w.job_id == placed.job_id)
            for rank in placed.subgroup.members:
                on = [a.job_id for a in active.values() if rank in a.subgroup.members]
                assert on in ([], [placed.preempts])
            assert not job.all_ranks or placed.subgroup.size == ranks
            if placed.preempts:
                outer = active[placed.preempts]
                active[placed.preempts] = replace(
                    outer, preempted_tokens=outer.preempted_tokens + job.tokens
                )
                assert outer.preempted_tokens + job.tokens <= MAX_PREEMPTED * outer.tokens
            active[job.job_id] = Active(
                job_id=job.job_id,
                tokens=job.tokens,
                tokens_left=job.tokens,
                subgroup=placed.subgroup,
                preemptible=not job.all_ranks,
                preempts=placed.preempts,
            )
            at = waiting.index(job)
            waiting = [
                replace(w, bypassed=w.bypassed + 1) if index < at else w
                for index, w in enumerate(waiting)
                if w is not job
            ]
            bypassed[job.job_id] = job.bypassed
        clock += 1
        paused = {a.preempts for a in active.values()}
        for job_id, job_at_work in list(active.items()):
            if job_id not in paused:
                done = int(2_000 * job_at_work.subgroup.size * chance.uniform(0.5, 1))
                active[job_id] = replace(
                    job_at_work, tokens_left=max(0, job_at_work.tokens_left - done)
                )
                if not active[job_id].tokens_left:
                    del active[job_id]
        assert clock < 100_000
    assert len(bypassed) == number
    assert max(bypassed.values()) <= MAX_BYPASSES
