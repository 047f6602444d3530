"""While the ranks are still stopping a cancelled job: it is cancelled again, or asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prefill.v1 import prefill_service_pb2 as pb

from tests.scheduling.test_dispatcher import side_by_side
from tests.support.in_process_service import answer, error_of

Serve = Callable[..., Any]


async def cancel(s: Any, job_id: str) -> pb.PrefillJob:
    return (await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=job_id))).job


async def test_two_clients_cancel_one_job(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 30
        s.executor.stop_s = 0.3
        job = await s.create()
        await s.until(lambda: bool(s.executor.started))
        jobs = await asyncio.gather(*(cancel(s, job.job_id) for _ in range(3)))
        assert [job.state for job in jobs] == [pb.JOB_STATE_CANCELLED] * 3
        assert s.executor.stopped == [job.job_id]
        assert s.executor.epoch == 0


async def test_a_call_leaves_the_job_that_a_client_has_cancelled(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 30
        s.executor.stop_s = 0.3
        call = s.ask()
        asking = asyncio.create_task(error_of(answer(call)))
        await s.until(lambda: bool(s.generation.requests))
        job_id = s.executor.started[0]
        cancelling = asyncio.create_task(cancel(s, job_id))
        await s.until(lambda: s.service._scheduler.jobs.find_live(job_id).cancelled_by is not None)
        call.cancel()
        assert (await cancelling).state == pb.JOB_STATE_CANCELLED
        await asyncio.wait({asking})
        assert s.executor.stopped == [job_id]
        assert s.executor.epoch == 0


async def test_a_prefix_is_asked_for_again_while_its_ranks_stop(serve: Serve) -> None:
    """There is a free rank for the new job, which must leave the old one's pages alone."""
    async with serve() as s:
        s.executor.step_s = 0.1
        s.executor.stop_s = 1.0
        first, second = await side_by_side(s)
        cancelling = asyncio.create_task(cancel(s, first))
        await s.until(lambda: s.service._scheduler.jobs.find_live(first).cancelled_by is not None)
        again = await s.create(frames=4)
        assert again.job_id != first
        s.executor.held.clear()
        await s.ended(second)
        assert again.job_id not in s.executor.started
        assert (await cancelling).state == pb.JOB_STATE_CANCELLED
        ended = (await s.ended(again.job_id))[-1]
        assert (ended.state, ended.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
        assert s.executor.epoch == 0
        assert s.executor.pages[ended.result.prefix_id].is_set()
        assert s.executor.leases[ended.result.prefix_id]
