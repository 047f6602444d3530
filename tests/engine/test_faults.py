"""What must not spread: a task cancelled again and again, a rank that fails alone or hangs."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from prefill_service.engine import executor
from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.spans import Stage
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.parallel.subgroups import Subgroup
from tests.support.engine_state import worker_pids
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

ALL_RANKS = Subgroup(0, 2)
FIRST = Subgroup(0, 1)
SECOND = Subgroup(1, 1)
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Pair:
    """Two ranks, and a video that keeps them at work for seconds."""

    def __init__(self, standalone: StandaloneExecutor, video: Path) -> None:
        self.standalone = standalone
        self.video = video
        self.executor = standalone.executor
        self.supervisor = standalone.supervisor

    async def task(
        self, subgroup: Subgroup = ALL_RANKS, fps: float = 2.0, max_pixels: int | None = None
    ) -> PrefillTask:
        sampling = FrameSampling(fps=fps, max_pixels=max_pixels)
        plan, _ = await self.standalone.plan(self.video, sampling)
        await self.supervisor.wait_ready()
        return self.standalone.task(self.video, plan, subgroup=subgroup)

    async def begun(self, task: PrefillTask) -> asyncio.Task[object]:
        """A prefill that computes."""
        job = asyncio.create_task(self.standalone.prefill(task))
        async with asyncio.timeout(60):
            while not any(
                p.job_id == task.job_id and p.stage is Stage.PREFILL
                for p in self.standalone.progress
            ):
                await asyncio.sleep(0.01)
        assert not job.done()
        return job

    async def works(self) -> None:
        task = await self.task(fps=0.2)
        await self.standalone.prefill(task)
        assert not self.standalone.read_kv(task).isnan().any()
        self.executor.drop_prefix(task.plan.prefix_id)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Pair]:
    video = make_video(seconds=90, fps=10, width=320, height=240)
    async with standalone_executor(
        checkpoint("qwen3_vl"),
        tmp_path_factory.mktemp("faults"),
        2,
        chunk_tokens=256,
        heartbeat_timeout_s=3.0,
    ) as standalone:
        yield Pair(standalone, video)


async def test_a_task_cancelled_again_and_again_ends_with_its_ranks(pair: Pair) -> None:
    epoch = pair.supervisor.epoch
    task = await pair.task()
    job = await pair.begun(task)
    while not job.done():
        job.cancel()
        await asyncio.sleep(0.001)
    assert job.cancelled()
    pair.executor.drop_prefix(task.plan.prefix_id)  # as whoever cancelled it does
    await pair.works()
    assert pair.supervisor.epoch == epoch


async def test_a_rank_without_room_for_its_pages_fails_the_task_only(pair: Pair) -> None:
    epoch = pair.supervisor.epoch
    pids = worker_pids(pair.supervisor)
    soft, hard = resource.prlimit(pids[1], resource.RLIMIT_NOFILE)
    resource.prlimit(pids[1], resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(ServiceError, match=r"no shared memory for .* bytes") as caught:
            await pair.standalone.prefill(await pair.task())
    finally:
        resource.prlimit(pids[1], resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.reason is Reason.KV_POOL_FULL
    await pair.works()
    assert (pair.supervisor.epoch, worker_pids(pair.supervisor)) == (epoch, pids)


async def test_what_kills_a_rank_is_no_error_of_tasks_on_others(pair: Pair) -> None:
    tasks = [await pair.task(subgroup, fps) for subgroup, fps in ((FIRST, 2.0), (SECOND, 2.5))]
    jobs = [await pair.begun(task) for task in tasks]
    pair.executor.drop_prefix(tasks[0].plan.prefix_id)
    for job in jobs:
        with pytest.raises(ServiceError, match=r"rank 0 failed: .* was dropped") as caught:
            await job
        assert caught.value.reason is Reason.RANK_DIED
        assert caught.value.metadata == {"rank": "0"}
    await pair.works()


async def test_a_rank_that_hangs_before_a_long_task_is_noticed(pair: Pair) -> None:
    """Its socket does not take the task, and the front end must not wait until it does."""
    task = await pair.task(fps=10.0, max_pixels=320 * 240 * 900)
    pid = worker_pids(pair.supervisor)[1]
    assert task.plan.num_tokens > 20_000
    rescue = threading.Timer(60, os.kill, (pid, signal.SIGKILL))  # of a test that would hang
    os.kill(pid, signal.SIGSTOP)
    rescue.start()
    with pytest.raises(ServiceError, match="rank 1 sent no heartbeat for 3 s"):
        await pair.standalone.prefill(task)
    assert rescue.is_alive()  # it has not been needed
    rescue.cancel()
    await pair.works()


async def test_ranks_that_do_not_stop_are_named_to_the_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_CANCEL_GRACE_S", 0.5)
    hung, other = [
        await pair.begun(await pair.task(subgroup, fps))
        for subgroup, fps in ((FIRST, 2.0), (SECOND, 2.5))
    ]
    os.kill(worker_pids(pair.supervisor)[0], signal.SIGSTOP)
    hung.cancel()
    with pytest.raises(ServiceError, match=r"ranks \[0\] did not stop job .* 0.5 s") as caught:
        await other
    assert caught.value.reason is Reason.RANK_STALLED
    assert caught.value.metadata["ranks"] == "[0]"
    await asyncio.wait({hung})
    assert hung.cancelled()
    await pair.works()
