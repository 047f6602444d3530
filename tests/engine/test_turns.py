"""Turns against ranks that do as they are told: whatever the mix, nobody waits in a circle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from prefill_service.engine.preemption import Allocation, RankAllocator
from prefill_service.parallel.subgroups import Subgroup, form_subgroups


class WorkerSupervisor:
    """Tasks of some chunks, in step on all ranks of their team, that pause between two of them."""

    def __init__(self, size: int, room: int = 1 << 30) -> None:
        self.turns = RankAllocator(
            self._pause, self._resume, lambda paused, inside: paused.tokens + inside.tokens <= room
        )
        self.going: list[set[str]] = [set() for _ in range(size)]
        self.known: set[str] = set()
        self.paused: dict[str, asyncio.Event] = {}
        self.asked: set[str] = set()
        self.pauses = 0
        self.log: list[str] = []

    def _pause(self, turn: Allocation) -> None:
        # Not that it is going: it may have been told to go on, and not have heard it yet.
        assert turn.job_id in self.known, f"{turn.job_id} has not begun"
        self.asked.add(turn.job_id)

    def _resume(self, turn: Allocation) -> None:
        self.paused.pop(turn.job_id).set()

    async def run(
        self,
        job: str,
        team: Subgroup,
        chunks: int,
        over: str = "",
        step: Callable[[], float] = lambda: 0.0,
    ) -> None:
        async with self.turns.take(job, team, chunks, over) as turn:
            await asyncio.sleep(step())  # for all ranks to be up, as in the group
            self._enter(job, team)
            self.known.add(job)
            self.turns.begun(turn)
            try:
                for chunk in range(chunks):
                    if job in self.asked and chunk:
                        await self._stand_aside(turn)
                    await self._compute(turn, step())
            finally:
                self.asked.discard(job)
                self._leave(job, team)
                self.known.discard(job)
        self.log.append(job)

    async def _compute(self, turn: Allocation, seconds: float) -> None:
        """One chunk, to whose end the ranks come although the task is cancelled meanwhile."""
        chunk = asyncio.ensure_future(asyncio.sleep(seconds))
        try:
            await asyncio.shield(chunk)
        except asyncio.CancelledError:
            self.turns.ending(turn)
            await chunk
            if turn.job_id in self.asked:  # they had agreed to pause when they heard of it
                await self._stand_aside(turn)
            raise

    async def _stand_aside(self, turn: Allocation) -> None:
        self.pauses += 1
        self.asked.discard(turn.job_id)
        self._leave(turn.job_id, turn.team)
        going_on = self.paused[turn.job_id] = asyncio.Event()
        for rank in turn.team.members:
            self.turns.said_paused(turn.job_id, rank)
        try:
            await going_on.wait()
        except asyncio.CancelledError:
            self.turns.ending(turn)
            await going_on.wait()
            raise
        finally:
            self._enter(turn.job_id, turn.team)

    def _enter(self, job: str, team: Subgroup) -> None:
        for rank in team.members:
            assert not self.going[rank], f"{job} and {self.going[rank]} on rank {rank}"
            self.going[rank].add(job)

    def _leave(self, job: str, team: Subgroup) -> None:
        for rank in team.members:
            self.going[rank].remove(job)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("ranks", [1, 3, 4, 8])
async def test_any_mix_ends(ranks: int) -> None:
    """Random arrivals, teams, wishes to overtake and cancels; a rank never has two that go on."""
    pauses = 0
    for seed in range(30):
        chance, group, teams = random.Random(seed), WorkerSupervisor(ranks), form_subgroups(ranks)

        async def one(
            number: int,
            chance: random.Random = chance,
            group: WorkerSupervisor = group,
            teams: tuple[Subgroup, ...] = teams,
        ) -> None:
            await asyncio.sleep(chance.random() * 0.01)
            over, team = f"{chance.randrange(12)}", chance.choice(teams)
            if group.turns._running and chance.random() < 0.7:
                outer = chance.choice(group.turns._running)
                inner = [other for other in teams if outer.team.contains(other)]
                over, team = outer.job_id, chance.choice(inner)
            job = asyncio.create_task(
                group.run(
                    f"{number}", team, chance.randint(1, 6), over,
                    lambda: chance.random() * 0.0015,
                )
            )  # fmt: skip
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.008)
                job.cancel()
            await asyncio.wait({job})
            if not job.cancelled():
                job.result()

        async with asyncio.timeout(30):
            await asyncio.gather(*(one(number) for number in range(12)))
        assert group.going == [set()] * ranks
        assert not group.turns._running
        assert not group.turns._waiting
        pauses += group.pauses
    assert pauses > 15, pauses


async def test_first_come_first_served_among_those_that_want_the_same() -> None:
    group, everyone, half = WorkerSupervisor(2), Subgroup(0, 2), Subgroup(0, 1)
    jobs = [
        asyncio.create_task(group.run(name, team, 3))
        for name, team in [("a", half), ("b", everyone), ("c", half), ("d", Subgroup(1, 1))]
    ]
    await asyncio.wait(jobs)
    assert group.log.index("b") < min(group.log.index("c"), group.log.index("d"))


async def test_one_that_overtakes_passes_those_that_wait_for_the_end() -> None:
    group, everyone = WorkerSupervisor(2), Subgroup(0, 2)
    jobs = [asyncio.create_task(group.run("long", everyone, 50))]
    await settle()
    jobs.append(asyncio.create_task(group.run("next", everyone, 1)))
    await settle()
    jobs.append(asyncio.create_task(group.run("short", Subgroup(1, 1), 1, over="long")))
    await asyncio.wait(jobs)
    assert group.log == ["short", "long", "next"]


@pytest.mark.parametrize(("room", "order"), [(61, ["short", "long"]), (60, ["long", "short"])])
async def test_nobody_is_paused_for_one_that_does_not_fit(room: int, order: list[str]) -> None:
    """Also one that begins only after the other has asked."""
    group, everyone = WorkerSupervisor(2, room), Subgroup(0, 2)
    jobs = [asyncio.create_task(group.run("before", everyone, 2))]
    await settle()
    jobs.append(asyncio.create_task(group.run("long", everyone, 60)))
    jobs.append(asyncio.create_task(group.run("short", everyone, 1, over="long")))
    await asyncio.wait(jobs)
    assert group.log == ["before", *order]
    assert group.pauses == (order[0] == "short")


async def test_one_that_has_not_begun_is_paused_when_it_has() -> None:
    group, everyone = WorkerSupervisor(2), Subgroup(0, 2)
    jobs = [
        asyncio.create_task(group.run("long", everyone, 60, step=lambda: 0.001)),
        asyncio.create_task(group.run("short", everyone, 1, over="long")),
    ]
    await asyncio.wait(jobs)
    assert group.log == ["short", "long"]
    assert group.pauses == 1


async def test_one_inside_a_pause_is_not_paused_itself() -> None:
    group, everyone = WorkerSupervisor(4), Subgroup(0, 4)
    jobs = [asyncio.create_task(group.run("long", everyone, 60))]
    await settle()
    jobs.append(asyncio.create_task(group.run("inside", everyone, 20, over="long")))
    await settle()
    jobs.append(asyncio.create_task(group.run("late", Subgroup(0, 2), 1, over="inside")))
    await asyncio.wait(jobs)
    assert group.log == ["inside", "long", "late"]
    assert group.pauses == 1


@pytest.mark.parametrize("over", ["gone", "half"])
async def test_nobody_is_paused_in_vain(over: str) -> None:
    """The one named is not there, or has not all of the ranks."""
    group = WorkerSupervisor(4)
    jobs = [asyncio.create_task(group.run("half", Subgroup(0, 2), 60))]
    await settle()
    jobs.append(asyncio.create_task(group.run("late", Subgroup(0, 4), 1, over=over)))
    await asyncio.wait(jobs)
    assert group.log == ["half", "late"]
    assert group.pauses == 0


async def test_one_that_is_being_stopped_is_not_paused() -> None:
    group, everyone = WorkerSupervisor(2), Subgroup(0, 2)
    stopped = asyncio.create_task(group.run("stopped", everyone, 60, step=lambda: 0.05))
    await settle()
    stopped.cancel()
    await settle()
    await group.run("late", everyone, 1, over="stopped")
    assert stopped.cancelled()
    assert group.pauses == 0


async def test_one_that_ends_before_its_pause_is_simply_followed() -> None:
    group, everyone = WorkerSupervisor(2), Subgroup(0, 2)
    jobs = [asyncio.create_task(group.run("last chunk", everyone, 1))]
    await settle()
    jobs.append(asyncio.create_task(group.run("short", everyone, 1, over="last chunk")))
    await asyncio.wait(jobs)
    assert group.log == ["last chunk", "short"]
    assert group.pauses == 0
