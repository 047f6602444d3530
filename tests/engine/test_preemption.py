"""Allocation of ranks that do what they are sent: whatever the mix, no task waits in a circle."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from prefill_service.engine.preemption import Allocation, RankAllocator
from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from tests.support.engine_state import allocated, has_no_task


class SimulatedRanks:
    """Tasks of some chunks, in step on all ranks of their subgroup, that pause between chunks."""

    def __init__(self, size: int, capacity: int = 1 << 30) -> None:
        self.subgroups = form_subgroups(size)
        self.allocator = RankAllocator(
            self._pause,
            self._resume,
            lambda preempted, preempting: preempted.tokens + preempting.tokens <= capacity,
        )
        self.computing: list[set[str]] = [set() for _ in range(size)]
        self.started: set[str] = set()
        self.paused: dict[str, asyncio.Event] = {}
        self.asked_to_pause: set[str] = set()
        self.pauses = 0
        self.ended: list[str] = []

    def _pause(self, allocation: Allocation) -> None:
        # Not that it computes: it may have been sent to go on, and not have received it yet.
        assert allocation.job_id in self.started, f"{allocation.job_id} has not started"
        self.asked_to_pause.add(allocation.job_id)

    def _resume(self, allocation: Allocation) -> None:
        self.paused.pop(allocation.job_id).set()

    async def run(
        self,
        job: str,
        subgroup: Subgroup,
        chunks: int,
        *,
        preempts: str = "",
        chunk_seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        acquired = self.allocator.acquire(job, subgroup, tokens=chunks, preempts=preempts)
        async with acquired as allocation:
            await asyncio.sleep(chunk_seconds())  # for all ranks to be up, as in the executor
            self._enter(job, subgroup)
            self.started.add(job)
            self.allocator.mark_started(allocation)
            try:
                for chunk in range(chunks):
                    if job in self.asked_to_pause and chunk:
                        await self._yield_ranks(allocation)
                    await self._compute(allocation, chunk_seconds())
            finally:
                self.asked_to_pause.discard(job)
                self._leave(job, subgroup)
                self.started.discard(job)
        self.ended.append(job)

    async def _compute(self, allocation: Allocation, seconds: float) -> None:
        """One chunk, to whose end the ranks come although the task is cancelled meanwhile."""
        chunk = asyncio.ensure_future(asyncio.sleep(seconds))
        try:
            await asyncio.shield(chunk)
        except asyncio.CancelledError:
            self.allocator.mark_stopping(allocation)
            await chunk
            if allocation.job_id in self.asked_to_pause:  # they had agreed to pause before
                await self._yield_ranks(allocation)
            raise

    async def _yield_ranks(self, allocation: Allocation) -> None:
        self.pauses += 1
        self.asked_to_pause.discard(allocation.job_id)
        self._leave(allocation.job_id, allocation.subgroup)
        resumed = self.paused[allocation.job_id] = asyncio.Event()
        for rank in allocation.subgroup.members:
            self.allocator.confirm_paused(allocation.job_id, rank)
        try:
            await resumed.wait()
        except asyncio.CancelledError:
            self.allocator.mark_stopping(allocation)
            await resumed.wait()
            raise
        finally:
            self._enter(allocation.job_id, allocation.subgroup)

    def _enter(self, job: str, subgroup: Subgroup) -> None:
        for rank in subgroup.members:
            assert not self.computing[rank], f"{job} and {self.computing[rank]} on rank {rank}"
            self.computing[rank].add(job)

    def _leave(self, job: str, subgroup: Subgroup) -> None:
        for rank in subgroup.members:
            self.computing[rank].remove(job)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def arrive_at_random(ranks: SimulatedRanks, chance: random.Random, number: int) -> None:
    """A task that comes at some time, may want to preempt another, and may be cancelled."""
    await asyncio.sleep(chance.random() * 0.01)
    preempts = f"{chance.randrange(12)}"
    subgroup = chance.choice(ranks.subgroups)
    if allocated(ranks.allocator) and chance.random() < 0.7:
        running = chance.choice(allocated(ranks.allocator))
        preempts = running.job_id
        subgroup = chance.choice([one for one in ranks.subgroups if running.subgroup.contains(one)])
    chunks = chance.randint(1, 6)
    job = asyncio.create_task(
        ranks.run(
            f"{number}",
            subgroup,
            chunks,
            preempts=preempts,
            chunk_seconds=lambda: chance.random() * 0.0015,
        )
    )
    if chance.random() < 0.3:
        await asyncio.sleep(chance.random() * 0.008)
        job.cancel()
    await asyncio.wait({job})
    if not job.cancelled():
        job.result()


@pytest.mark.parametrize("size", [1, 3, 4, 8])
async def test_any_mix_ends(size: int) -> None:
    """Random arrivals, subgroups, preemptions and cancels; no rank ever computes two at once."""
    pauses = 0
    for seed in range(30):
        chance = random.Random(seed)
        ranks = SimulatedRanks(size)
        async with asyncio.timeout(30):
            await asyncio.gather(*(arrive_at_random(ranks, chance, n) for n in range(12)))
        assert ranks.computing == [set()] * size
        assert has_no_task(ranks.allocator)
        pauses += ranks.pauses
    assert pauses > 15, pauses


async def test_first_come_first_served_among_those_that_want_the_same() -> None:
    ranks = SimulatedRanks(2)
    both = Subgroup(0, 2)
    first = Subgroup(0, 1)
    jobs = [
        asyncio.create_task(ranks.run(name, subgroup, 3))
        for name, subgroup in [("a", first), ("b", both), ("c", first), ("d", Subgroup(1, 1))]
    ]
    await asyncio.wait(jobs)
    assert ranks.ended.index("b") < min(ranks.ended.index("c"), ranks.ended.index("d"))


async def test_one_that_preempts_passes_those_that_wait_for_the_end() -> None:
    ranks = SimulatedRanks(2)
    both = Subgroup(0, 2)
    jobs = [asyncio.create_task(ranks.run("long", both, 50))]
    await settle()
    jobs.append(asyncio.create_task(ranks.run("next", both, 1)))
    await settle()
    jobs.append(asyncio.create_task(ranks.run("short", Subgroup(1, 1), 1, preempts="long")))
    await asyncio.wait(jobs)
    assert ranks.ended == ["short", "long", "next"]


@pytest.mark.parametrize(("capacity", "order"), [(61, ["short", "long"]), (60, ["long", "short"])])
async def test_nobody_is_paused_for_one_that_does_not_fit(capacity: int, order: list[str]) -> None:
    """Also one that starts only after the other has asked."""
    ranks = SimulatedRanks(2, capacity)
    both = Subgroup(0, 2)
    jobs = [asyncio.create_task(ranks.run("before", both, 2))]
    await settle()
    jobs.append(asyncio.create_task(ranks.run("long", both, 60)))
    jobs.append(asyncio.create_task(ranks.run("short", both, 1, preempts="long")))
    await asyncio.wait(jobs)
    assert ranks.ended == ["before", *order]
    assert ranks.pauses == (order[0] == "short")


async def test_one_that_has_not_started_is_paused_when_it_has() -> None:
    ranks = SimulatedRanks(2)
    both = Subgroup(0, 2)
    jobs = [
        asyncio.create_task(ranks.run("long", both, 60, chunk_seconds=lambda: 0.001)),
        asyncio.create_task(ranks.run("short", both, 1, preempts="long")),
    ]
    await asyncio.wait(jobs)
    assert ranks.ended == ["short", "long"]
    assert ranks.pauses == 1


async def test_one_that_runs_in_a_pause_is_not_paused_itself() -> None:
    ranks = SimulatedRanks(4)
    all_ranks = Subgroup(0, 4)
    jobs = [asyncio.create_task(ranks.run("long", all_ranks, 60))]
    await settle()
    jobs.append(asyncio.create_task(ranks.run("inside", all_ranks, 20, preempts="long")))
    await settle()
    jobs.append(asyncio.create_task(ranks.run("late", Subgroup(0, 2), 1, preempts="inside")))
    await asyncio.wait(jobs)
    assert ranks.ended == ["inside", "long", "late"]
    assert ranks.pauses == 1


@pytest.mark.parametrize("preempts", ["gone", "half"])
async def test_nobody_is_paused_in_vain(preempts: str) -> None:
    """The one named is not there, or has not all of the ranks."""
    ranks = SimulatedRanks(4)
    jobs = [asyncio.create_task(ranks.run("half", Subgroup(0, 2), 60))]
    await settle()
    jobs.append(asyncio.create_task(ranks.run("late", Subgroup(0, 4), 1, preempts=preempts)))
    await asyncio.wait(jobs)
    assert ranks.ended == ["half", "late"]
    assert ranks.pauses == 0


async def test_one_that_is_being_stopped_is_not_paused() -> None:
    ranks = SimulatedRanks(2)
    both = Subgroup(0, 2)
    stopped = asyncio.create_task(ranks.run("stopped", both, 60, chunk_seconds=lambda: 0.05))
    await settle()
    stopped.cancel()
    await settle()
    await ranks.run("late", both, 1, preempts="stopped")
    assert stopped.cancelled()
    assert ranks.pauses == 0


async def test_one_that_ends_before_its_pause_is_simply_followed() -> None:
    ranks = SimulatedRanks(2)
    both = Subgroup(0, 2)
    jobs = [asyncio.create_task(ranks.run("last chunk", both, 1))]
    await settle()
    jobs.append(asyncio.create_task(ranks.run("short", both, 1, preempts="last chunk")))
    await asyncio.wait(jobs)
    assert ranks.ended == ["last chunk", "short"]
    assert ranks.pauses == 0
