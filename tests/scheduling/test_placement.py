"""Degree, place, order and overtaking; and that nobody starves, whoever comes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from prefill_service.scheduling.placement import (
    OVERTAKEN,
    PASSED,
    SHORT,
    Active,
    Placement,
    Placer,
    Waiting,
    assumed_seconds,
)

CHUNK = 512
ALL = Subgroup(0, 4)


class Room:
    """Of ``tokens`` on each rank, with an exchange that divides them; of two at once if ``two``."""

    def __init__(self, tokens: int = 1 << 30, two: bool = True) -> None:
        self.tokens, self.two = tokens, two

    def fits(self, tokens: int, team: Subgroup) -> bool:
        return tokens <= self.tokens * team.size

    def fit_together(self, paused: tuple[int, Subgroup], inside: tuple[int, Subgroup]) -> bool:
        return self.two


def placer(ranks: int = 4, room: Room | None = None, overtaking: bool = True) -> Placer:
    return Placer(form_subgroups(ranks), CHUNK, room or Room(), overtaking)


def queue(*tokens: int) -> list[Waiting]:
    return [Waiting(f"{number}", count) for number, count in enumerate(tokens)]


def teams(placed: Sequence[Placement]) -> list[Subgroup]:
    return [placement.team for placement in placed]


@pytest.mark.parametrize("tokens", [10, 100_000])
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_alone_it_has_all_ranks(ranks: int, tokens: int) -> None:
    assert teams(placer(ranks).place(queue(tokens), [])) == [Subgroup(0, ranks)]


def test_several_at_once_on_teams_of_several_sizes() -> None:
    placed = placer().place(queue(2 * CHUNK, CHUNK, CHUNK), [])
    assert teams(placed) == [Subgroup(0, 2), Subgroup(2, 1), Subgroup(3, 1)]
    assert not any(placement.over for placement in placed)


def test_long_ones_go_one_after_the_other_until_the_queue_is_long() -> None:
    place = placer()
    degrees = {waiting: place.degree(100 * CHUNK, waiting, 100) for waiting in (1, 2, 8, 40)}
    assert degrees == {1: 4, 2: 4, 8: 2, 40: 1}
    assert teams(place.place(queue(100 * CHUNK, 100 * CHUNK), [])) == [ALL]


def test_the_degree_is_the_best_of_all() -> None:
    """Brute force: the mean end of W equal jobs, dealt to the teams of one size in turn."""
    for ranks in (1, 2, 3, 4, 5, 8):
        place, family = placer(ranks), form_subgroups(ranks)
        for waiting in range(1, 25):
            means = {}
            for size in {team.size for team in family}:
                count = sum(team.size == size for team in family)
                ends = [
                    (number // count + 1) * assumed_seconds(10_000, size)
                    for number in range(-(-waiting // count) * count)
                ]
                means[size] = sum(ends) / len(ends)
            chosen = place.degree(10_000, waiting, ranks)
            assert means[chosen] == pytest.approx(min(means.values()))


def test_fewer_ranks_now_or_more_later_whichever_ends_first() -> None:
    tokens = 100 * CHUNK
    for left, expected in ((CHUNK, []), (90 * CHUNK, [Subgroup(2, 2)])):
        at_work = Active("a", tokens, left, Subgroup(0, 2), pausable=False)
        assert teams(placer().place([Waiting("b", tokens)], [at_work])) == expected


def test_one_behind_begins_if_it_is_in_nobodys_way() -> None:
    """The first one in the queue waits for all ranks, half of which are free for 10 chunks."""
    at_work = Active("a", 40 * CHUNK, 10 * CHUNK, Subgroup(0, 2), pausable=False)
    first = Waiting("b", 400 * CHUNK)
    assert placer().place([first], [at_work]) == []
    small, large = Waiting("c", 4 * CHUNK), Waiting("d", 30 * CHUNK)
    placed = placer().place([first, large, small], [at_work])
    assert [p.job_id for p in placed] == ["c"]
    tired = replace(first, passed=PASSED)
    assert placer().place([tired, large, small], [at_work]) == []


def test_a_prefix_has_as_many_ranks_as_it_needs_room() -> None:
    tight = placer(room=Room(CHUNK))
    assert teams(tight.place(queue(CHUNK, CHUNK + 1), [])) == [Subgroup(0, 1), Subgroup(2, 2)]
    assert teams(tight.place(queue(3 * CHUNK, *[CHUNK] * 40), [])) == [ALL]
    assert teams(tight.place(queue(9 * CHUNK, 8 * CHUNK), [])) == [ALL]  # which will refuse it


def test_who_overtakes() -> None:
    long = Active("long", 40 * CHUNK, 20 * CHUNK, ALL)
    short = Waiting("short", 20 * CHUNK // SHORT)
    (placed,) = placer().place([short], [long])
    assert (placed.over, placed.team) == ("long", ALL)  # whose other ranks would only wait
    two = placer().place(queue(CHUNK, CHUNK), [long])
    assert [p.over for p in two] == ["long"]  # the second one in the next pause
    for waiting, active in [
        (Waiting("not so short", short.tokens + 1), long),
        (short, replace(long, overtaken=int(OVERTAKEN * long.tokens) - short.tokens + 1)),
        (short, replace(long, pausable=False)),
        (short, replace(long, inside="another")),
    ]:
        assert placer().place([waiting], [active]) == []
    assert placer(room=Room(two=False)).place([short], [long]) == []
    assert placer(overtaking=False).place([short], [long]) == []


def test_many_short_ones_share_a_pause() -> None:
    """Sixteen that wait are done soonest side by side."""
    long = Active("long", 400 * CHUNK, 400 * CHUNK, ALL)
    placed = placer().place(queue(*[CHUNK] * 16), [long])
    assert len(placed) > 1
    assert {p.over for p in placed} == {"long"}
    assert sum(p.team.size for p in placed) == 4


def test_a_comparison_has_all_ranks_or_waits() -> None:
    one = Waiting("one", CHUNK, everyone=True)
    busy = Active("a", 4 * CHUNK, 3 * CHUNK, Subgroup(0, 1))
    assert placer().place([one], [busy]) == []
    assert teams(placer().place([one, Waiting("b", CHUNK)], [])) == [ALL]
    (placed,) = placer().place([one], [Active("a", 40 * CHUNK, 30 * CHUNK, ALL)])
    assert (placed.team, placed.over) == (ALL, "a")


@pytest.mark.parametrize("seed", range(6))
def test_nobody_starves(seed: int) -> None:
    """Short jobs without end, and some long ones: each begins and ends, within its bounds."""
    chance, ranks = random.Random(seed), random.Random(seed).choice([1, 2, 3, 4, 8])
    place, clock, number = placer(ranks), 0.0, 0
    waiting: list[Waiting] = []
    active: dict[str, Active] = {}
    passed: dict[str, int] = {}
    while number < 120 or waiting or active:
        for _ in range(chance.choice([0, 1, 3]) if number < 120 else 0):
            tokens = chance.choice([100, 600, 2_000, 60_000])
            waiting.append(Waiting(f"{number}", tokens, chance.random() < 0.05))
            number += 1
        for placed in place.place(waiting, list(active.values())):
            job = next(w for w in waiting if w.job_id == placed.job_id)
            for rank in placed.team.members:
                on = [a.job_id for a in active.values() if rank in a.team.members]
                assert on in ([], [placed.over])
            assert not job.everyone or placed.team.size == ranks
            if placed.over:
                outer = active[placed.over]
                active[placed.over] = replace(outer, overtaken=outer.overtaken + job.tokens)
                assert outer.overtaken + job.tokens <= OVERTAKEN * outer.tokens
            active[job.job_id] = Active(
                job.job_id, job.tokens, job.tokens, placed.team,
                pausable=not job.everyone, inside=placed.over,
            )  # fmt: skip
            at = waiting.index(job)
            waiting = [
                replace(w, passed=w.passed + 1) if index < at else w
                for index, w in enumerate(waiting)
                if w is not job
            ]
            passed[job.job_id] = job.passed
        clock += 1
        paused = {a.inside for a in active.values()}
        for job_id, job_at_work in list(active.items()):
            if job_id not in paused:
                done = int(2_000 * job_at_work.team.size * chance.uniform(0.5, 1))
                active[job_id] = replace(job_at_work, left=max(0, job_at_work.left - done))
                if not active[job_id].left:
                    del active[job_id]
        assert clock < 100_000
    assert len(passed) == number
    assert max(passed.values()) <= PASSED
