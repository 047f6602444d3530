"""Several jobs at once: the order of their starts, pauses, cancels, deaths and the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.parallel.subgroups import Subgroup

Serve = Callable[..., Any]
SUCCEEDED, QUEUED, RUNNING = pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING


async def side_by_side(s: Any) -> tuple[str, str]:
    """Two jobs of a chunk each, on a rank each, that get no further as long as they are held."""
    blocker = await s.create(frames=6)
    s.group.held.add(blocker.job_id)
    await s.until(lambda: bool(s.group.started))
    first, second = await s.create(frames=4), await s.create(frames=2)
    s.group.held |= {first.job_id, second.job_id}
    s.group.held.remove(blocker.job_id)
    await s.ended(blocker.job_id)
    await s.until(lambda: len(s.group.started) == 3)
    return first.job_id, second.job_id


def team_of(s: Any, job_id: str) -> Subgroup:
    return next(task.team for task in s.group.tasks if task.job_id == job_id)


async def test_short_jobs_run_side_by_side(serve: Serve) -> None:
    async with serve() as s:
        s.group.step_s = 0.1
        first, second = await side_by_side(s)
        assert (await s.get(first)).state == RUNNING
        assert (await s.get(second)).state == RUNNING
        s.group.held.clear()
        jobs = [(await s.ended(job_id))[-1] for job_id in (first, second)]
        assert [job.state for job in jobs] == [SUCCEEDED] * 2
        assert [{shard.rank for shard in job.result.shards} for job in jobs] == [{0}, {1}]
        assert [team_of(s, job_id) for job_id in (first, second)] == [
            Subgroup(0, 1),
            Subgroup(1, 1),
        ]


async def test_a_short_job_overtakes_a_long_one(serve: Serve) -> None:
    async with serve() as s:
        s.group.step_s = 0.1
        long = await s.create(frames=40)
        s.group.held.add(long.job_id)
        await s.until(lambda: bool(s.group.started))
        short = await s.create(frames=4)
        assert (await s.ended(short.job_id))[-1].state == SUCCEEDED
        assert (await s.get(long.job_id)).state == RUNNING
        assert list(s.group.paused) == [long.job_id]
        s.group.held.clear()
        assert (await s.ended(long.job_id))[-1].state == SUCCEEDED


async def test_nobody_overtakes_who_does_not_fit_or_may_not(serve: Serve) -> None:
    for elastic in (True, False):
        async with serve(engine={"elastic": elastic}) as s:
            s.group.step_s, s.group.roomy = 0.03, not elastic
            s.group.teams = s.group.teams if elastic else s.group.teams[:1]
            jobs = [await s.create(frames=40 - elastic), await s.create(frames=4 - elastic)]
            for job in jobs:
                await s.ended(job.job_id)
            assert s.group.started == [job.job_id for job in jobs]
            assert not s.group.paused


async def test_cancelling_one_of_several(serve: Serve) -> None:
    async with serve() as s:
        s.group.step_s = 0.1
        first, second = await side_by_side(s)
        await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=first))
        assert s.group.stopped == [first]
        s.group.held.clear()
        assert (await s.ended(second))[-1].state == SUCCEEDED


async def test_the_death_of_a_rank_ends_all_but_counts_for_its_own(serve: Serve) -> None:
    """Rank 1 dies under the second job twice, which then has failed; the first one has not."""
    async with serve() as s:
        s.group.step_s = 0.1
        first, second = await side_by_side(s)
        for starts in (5, None):
            s.group.die()
            if starts:
                await s.until(lambda: len(s.group.started) == 5)
        s.group.held.clear()
        ended = (await s.ended(second))[-1]
        assert (ended.error.reason, ended.attempts) == ("RANK_DIED", 2)
        ended = (await s.ended(first))[-1]
        assert (ended.state, ended.attempts) == (SUCCEEDED, 3)


async def test_stopping_the_service_stops_all_and_keeps_those_that_clients_made(
    serve: Serve,
) -> None:
    async with serve() as s:
        s.group.step_s = 0.1
        jobs = await side_by_side(s)
        s.service.shut_down()
        s.service.shut_down()
        await s.task
        assert sorted(s.group.stopped) == sorted(jobs)
        s.group.held.clear()
    async with serve() as s:
        for job_id in jobs:
            ended = (await s.ended(job_id))[-1]
            assert (ended.state, ended.attempts) == (SUCCEEDED, 1)


async def test_queue_positions_count_those_at_work(serve: Serve) -> None:
    async with serve() as s:
        s.group.step_s = 0.1
        await side_by_side(s)
        waiting = [await s.create(frames=frames) for frames in (8, 10)]
        assert [job.queue_position for job in waiting] == [2, 3]
        assert {job.state for job in waiting} == {QUEUED}
