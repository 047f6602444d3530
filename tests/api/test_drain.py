"""How the service starts and ends: failed starts, signals, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.errors import Reason, ServiceError
from tests.support.in_process_service import answer, error_of, health, serving
from tests.support.simulated_backends import SimulatedExecutor, SimulatedGenerationServer

Serve = Callable[..., Any]
NEVER_S = 3600.0
"""What is not waited for takes so long ..."""
ENOUGH_S = 60.0
"""... and what ends at once has so long, on a machine that does much else."""


async def test_failed_start_of_a_part_ends_the_service(tmp_path: Path, template: Any) -> None:
    async with serving(tmp_path / "data", template) as s:
        s.executor.step_s = NEVER_S
        job_id = (await s.create()).job_id
        await s.until(lambda: bool(s.executor.started))

    class Broken(SimulatedExecutor):
        async def start(self) -> None:
            raise ServiceError(Reason.MODEL_INVALID, "config.json is missing")

        async def wait_ready(self) -> None:
            await self.start()

    group = Broken()
    decoder = SimulatedGenerationServer(group, start_s=NEVER_S)
    with pytest.raises(ServiceError, match=r"config\.json is missing"):
        async with asyncio.timeout(ENOUGH_S), serving(tmp_path / "data", template, group, decoder):
            pass
    async with serving(tmp_path / "data", template) as s:  # and the queue is as it was
        assert (await s.ended(job_id))[-1].state == pb.JOB_STATE_SUCCEEDED


async def test_drain_lets_answers_end_and_refuses_new_ones(serve: Serve) -> None:
    async with serve() as s:
        await answer(s.ask())
        s.generation.may_speak.clear()
        s.executor.step_s = NEVER_S
        reading = asyncio.create_task(answer(s.ask()))
        job = await s.create(frames=30)
        watch = s.prefills.WatchPrefillJob(pb.WatchPrefillJobRequest(job_id=job.job_id))
        await watch.read()
        watching = asyncio.create_task(error_of(to_the_end(watch)))
        await s.until(lambda: len(s.generation.requests) == 2 and len(s.executor.started) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(ENOUGH_S):
            while await health(s.channel) == "SERVING":
                await asyncio.sleep(0.01)
        assert await health(s.channel) == "NOT_SERVING"
        assert await health(s.channel, "liveness") == "NOT_SERVING"
        code, reason, _, details = await error_of(s.create(frames=12))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert "RetryInfo" in details
        s.generation.may_speak.set()
        assert (await reading).text == "A red car."
        assert (await watching)[1] == "SHUTTING_DOWN"
        async with asyncio.timeout(ENOUGH_S):
            await s.task


async def to_the_end(stream: Any) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


async def test_drain_time_is_bounded(serve: Serve) -> None:
    async with serve(server={"drain_seconds": 0.5}) as s:
        s.executor.step_s = NEVER_S
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: bool(s.generation.requests))
        begin = time.monotonic()
        s.service.shut_down()
        async with asyncio.timeout(ENOUGH_S):
            await s.task
        assert time.monotonic() - begin > 0.4
        code, reason, _, details = await reading
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert "RetryInfo" in details
        assert len(s.executor.stopped) == 1
        assert s.executor.open_leases == 0


async def test_second_signal_stops_at_once(serve: Serve) -> None:
    async with serve(server={"drain_seconds": NEVER_S}) as s:
        s.executor.step_s = NEVER_S
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: bool(s.generation.requests))
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.3)
        assert not s.task.done()
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(ENOUGH_S):
            await s.task
        assert (await reading)[1] == "SHUTTING_DOWN"
        assert len(s.executor.stopped) == 1


async def test_signal_during_start(tmp_path: Path, template: Any) -> None:
    group = SimulatedExecutor(start_s=NEVER_S)
    async with serving(tmp_path / "data", template, group, wait=False) as s:
        s.service.shut_down()
        async with asyncio.timeout(ENOUGH_S):
            await s.task
        assert s.lines == []
