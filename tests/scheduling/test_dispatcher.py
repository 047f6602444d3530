"""Several jobs at once: the order of their starts, pauses, cancels, deaths and the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.parallel.subgroups import Subgroup

Serve = Callable[..., Any]
SUCCEEDED = pb.JOB_STATE_SUCCEEDED
QUEUED = pb.JOB_STATE_QUEUED
RUNNING = pb.JOB_STATE_RUNNING


async def side_by_side(s: Any) -> tuple[str, str]:
    """Two jobs of a chunk each, on a rank each, that get no further as long as they are held."""
    blocker = await s.create(frames=6)
    s.executor.held.add(blocker.job_id)
    await s.until(lambda: bool(s.executor.started))
    first = await s.create(frames=4)
    second = await s.create(frames=2)
    s.executor.held |= {first.job_id, second.job_id}
    s.executor.held.remove(blocker.job_id)
    await s.ended(blocker.job_id)
    await s.until(lambda: len(s.executor.started) == 3)
    return first.job_id, second.job_id


def subgroup_of(s: Any, job_id: str) -> Subgroup:
    return next(task.subgroup for task in s.executor.tasks if task.job_id == job_id)


async def test_short_jobs_run_side_by_side(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        first, second = await side_by_side(s)
        assert (await s.get(first)).state == RUNNING
        assert (await s.get(second)).state == RUNNING
        s.executor.held.clear()
        jobs = [(await s.ended(job_id))[-1] for job_id in (first, second)]
        assert [job.state for job in jobs] == [SUCCEEDED] * 2
        assert [{shard.rank for shard in job.result.shards} for job in jobs] == [{0}, {1}]
        assert [subgroup_of(s, job_id) for job_id in (first, second)] == [
            Subgroup(0, 1),
            Subgroup(1, 1),
        ]


async def test_a_short_job_preempts_a_long_one(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        long = await s.create(frames=40)
        s.executor.held.add(long.job_id)
        await s.until(lambda: bool(s.executor.started))
        short = await s.create(frames=4)
        assert (await s.ended(short.job_id))[-1].state == SUCCEEDED
        assert (await s.get(long.job_id)).state == RUNNING
        assert list(s.executor.paused) == [long.job_id]
        s.executor.held.clear()
        assert (await s.ended(long.job_id))[-1].state == SUCCEEDED


async def test_no_job_preempts_that_does_not_fit_or_may_not(serve: Serve) -> None:
    for elastic in (True, False):
        async with serve(engine={"elastic": elastic}) as s:
            s.executor.step_s = 0.03
            s.executor.roomy = not elastic
            s.executor.subgroups = s.executor.subgroups if elastic else s.executor.subgroups[:1]
            jobs = [await s.create(frames=40 - elastic), await s.create(frames=4 - elastic)]
            for job in jobs:
                await s.ended(job.job_id)
            assert s.executor.started == [job.job_id for job in jobs]
            assert not s.executor.paused


async def test_cancelling_one_of_several(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        first, second = await side_by_side(s)
        await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=first))
        assert s.executor.stopped == [first]
        s.executor.held.clear()
        assert (await s.ended(second))[-1].state == SUCCEEDED


async def test_the_death_of_a_rank_ends_all_but_counts_for_its_own(serve: Serve) -> None:
    """Rank 1 dies under the second job twice, which then has failed; the first one has not."""
    async with serve() as s:
        s.executor.step_s = 0.1
        first, second = await side_by_side(s)
        for starts in (5, None):
            s.executor.die()
            if starts:
                await s.until(lambda: len(s.executor.started) == 5)
        s.executor.held.clear()
        ended = (await s.ended(second))[-1]
        assert (ended.error.reason, ended.attempts) == ("RANK_DIED", 2)
        ended = (await s.ended(first))[-1]
        assert (ended.state, ended.attempts) == (SUCCEEDED, 3)


async def test_stopping_the_service_stops_all_and_keeps_those_that_clients_made(
    serve: Serve,
) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        jobs = await side_by_side(s)
        s.service.shut_down()
        s.service.shut_down()
        await s.task
        assert sorted(s.executor.stopped) == sorted(jobs)
        s.executor.held.clear()
    async with serve() as s:
        for job_id in jobs:
            ended = (await s.ended(job_id))[-1]
            assert (ended.state, ended.attempts) == (SUCCEEDED, 1)


async def test_queue_positions_count_those_at_work(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        await side_by_side(s)
        waiting = [await s.create(frames=frames) for frames in (8, 10)]
        assert [job.queue_position for job in waiting] == [2, 3]
        assert {job.state for job in waiting} == {QUEUED}
