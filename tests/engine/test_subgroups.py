"""Subgroups side by side and one in another's pause: the same KV, whoever else computes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from prefill_service.attention.quality import resolve_policy
from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.spans import Stage
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.catalog import DEMAND, EXCHANGES, GATHER, USP, ExchangeKind
from prefill_service.parallel.exchanges.registry import choose_exchange
from prefill_service.parallel.subgroups import Subgroup
from tests.support.engine_state import is_idle, subgroups_of_tasks, worker_pids
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

ALL_RANKS = Subgroup(0, 4)
FIRST = Subgroup(0, 2)
SECOND = Subgroup(2, 2)
LAST = Subgroup(3, 1)
HEADS = 4
KV_HEADS = 2
SHORT = "short"
LONG = "long"
KINDS = EXCHANGES
pytestmark = pytest.mark.asyncio(loop_scope="module")


class Four:
    """Four ranks, a short and a long video, and the KV of each as it is when alone."""

    def __init__(self, standalone: StandaloneExecutor, videos: dict[str, Path]) -> None:
        self.standalone = standalone
        self.videos = videos
        self.plans: dict[str, PrefixPlan] = {}
        self.alone: dict[str, Tensor] = {}
        self.outcomes: dict[str, PrefillOutcome] = {}

    async def prepare(self) -> None:
        for name, video in self.videos.items():
            self.plans[name], _ = await self.standalone.plan(video)
            task = self.task(name, ALL_RANKS)
            self.outcomes[name] = await self.standalone.prefill(task)
            self.alone[name] = self.kv(task)

    def task(self, name: str, subgroup: Subgroup, kind: ExchangeKind = GATHER) -> PrefillTask:
        """A task with pages of its own, however many compute the same video."""
        exchange = choose_exchange(kind, subgroup.size, q_heads=HEADS, kv_heads=KV_HEADS)
        task = self.standalone.task(
            self.videos[name], self.plans[name], exchange, subgroup=subgroup
        )
        plan = replace(task.plan, prefix_id=f"{name}-{task.job_id}")
        return replace(task, plan=plan, manifest=replace(task.manifest, prefix_id=plan.prefix_id))

    def kv(self, task: PrefillTask) -> Tensor:
        found = self.standalone.read_kv(task)
        self.standalone.executor.drop_prefix(task.plan.prefix_id)
        return found

    def check(self, name: str, task: PrefillTask) -> None:
        expected = self.alone[name]
        error = (self.kv(task) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{name} on {task.subgroup} by {task.exchange}"

    async def begun(self, task: PrefillTask, preempts: str = "") -> asyncio.Task[object]:
        """A prefill that computes."""
        job = asyncio.create_task(self.standalone.prefill(task, preempts))
        async with asyncio.timeout(60):
            while not any(
                p.job_id == task.job_id and p.stage is Stage.PREFILL
                for p in self.standalone.progress
            ):
                await asyncio.sleep(0.01)
        return job


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def four(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Four]:
    videos = {
        SHORT: make_video(seconds=1.0, fps=5, width=130, height=98),
        LONG: make_video(seconds=45.0, fps=10, width=160, height=120),
    }
    folder = tmp_path_factory.mktemp("subgroups")
    async with standalone_executor(
        checkpoint("qwen3_vl"),
        folder,
        4,
        chunk_tokens=40,
        sparse_from_tokens=400,
        heartbeat_timeout_s=60.0,
    ) as standalone:
        four = Four(standalone, videos)
        await four.prepare()
        yield four


async def test_side_by_side(four: Four) -> None:
    long = four.task(LONG, FIRST)
    job = await four.begun(long)
    shorts = [four.task(SHORT, SECOND, kind) for kind in KINDS]
    for short in shorts:
        outcome = await four.standalone.prefill(short)
        assert outcome.bytes_received > 0
        assert {run.rank for run in short.manifest.runs} <= set(SECOND.members)
        assert not (job.done() and short is shorts[0])
    await job
    for name, task in [(LONG, long), *((SHORT, short) for short in shorts)]:
        four.check(name, task)


@pytest.mark.parametrize(
    ("kind", "subgroup"),
    [
        (GATHER, ALL_RANKS),
        (USP, SECOND),
        (DEMAND, LAST),
    ],
)
async def test_a_short_one_preempts(four: Four, kind: ExchangeKind, subgroup: Subgroup) -> None:
    long = four.task(LONG, ALL_RANKS, kind)
    short = four.task(SHORT, subgroup, kind)
    job = await four.begun(long)
    await four.standalone.prefill(short, preempts=long.job_id)
    assert not job.done()
    four.check(SHORT, short)
    outcome = await job
    four.check(LONG, long)
    assert 0 < outcome.paused_s < outcome.seconds


async def test_a_pause_changes_no_bit_of_sparse_attention(four: Four) -> None:
    sparse = resolve_policy(epsilon=0.6)
    alone, paused = (replace(four.task(LONG, ALL_RANKS), policy=sparse) for _ in range(2))
    outcome = await four.standalone.prefill(alone)
    assert outcome.attention.density < 1
    expected = four.kv(alone)
    job = await four.begun(paused)
    inside = replace(four.task(LONG, FIRST), policy=sparse)
    await four.standalone.prefill(inside, preempts=paused.job_id)
    found = await job
    assert found.paused_s > 0
    assert found.attention.density == outcome.attention.density
    assert torch.equal(four.kv(paused), expected)


async def test_both_halves_run_in_one_pause(four: Four) -> None:
    long = four.task(LONG, ALL_RANKS)
    shorts = [four.task(SHORT, subgroup) for subgroup in (FIRST, SECOND)]
    job = await four.begun(long)
    await asyncio.gather(*(four.standalone.prefill(s, preempts=long.job_id) for s in shorts))
    assert not job.done()
    for short in shorts:
        four.check(SHORT, short)
    await job
    four.check(LONG, long)


async def test_what_a_preempted_one_moves_is_counted_apart(four: Four) -> None:
    long = four.task(LONG, ALL_RANKS)
    short = four.task(SHORT, ALL_RANKS)
    job = await four.begun(long)
    inside = await four.standalone.prefill(short, preempts=long.job_id)
    outcome = await job
    for found, alone in ((outcome, four.outcomes[LONG]), (inside, four.outcomes[SHORT])):
        moved, expected = (o.communication["broadcast"] for o in (found, alone))
        assert (moved.calls, moved.bytes_received) == (expected.calls, expected.bytes_received)


async def test_cancelling_the_one_inside_lets_the_paused_go_on(four: Four) -> None:
    long = four.task(LONG, ALL_RANKS)
    inside = four.task(LONG, FIRST)
    outer = await four.begun(long)
    inner = await four.begun(inside, preempts=long.job_id)
    inner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await inner
    await outer
    four.check(LONG, long)


async def test_one_is_paused_for_another_that_comes_at_the_same_moment(four: Four) -> None:
    long = four.task(LONG, ALL_RANKS)
    short = four.task(SHORT, ALL_RANKS)
    outer = asyncio.create_task(four.standalone.prefill(long))
    inner = asyncio.create_task(four.standalone.prefill(short, preempts=long.job_id))
    await inner
    assert not outer.done()
    assert (await outer).paused_s > 0
    for name, task in ((LONG, long), (SHORT, short)):
        four.check(name, task)


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelling_the_paused_one_leaves_the_one_inside(four: Four, times: int) -> None:
    long = four.task(LONG, ALL_RANKS)
    inside = four.task(LONG, SECOND)
    outer = await four.begun(long)
    inner = await four.begun(inside, preempts=long.job_id)
    for _ in range(times):
        outer.cancel()
        await asyncio.sleep(0.01)
    assert not outer.done()  # its ranks are not free before they have heard of it
    await inner
    four.check(LONG, inside)
    with pytest.raises(asyncio.CancelledError):
        await outer
    epoch = four.standalone.supervisor.epoch
    again = four.task(SHORT, ALL_RANKS)
    await four.standalone.prefill(again)
    four.check(SHORT, again)
    assert four.standalone.supervisor.epoch == epoch


async def test_a_mix_of_subgroups_cancels_and_kills(four: Four) -> None:
    """Whatever happens, every task ends, as it should or as it was made to, with the right KV."""
    chance = random.Random(11)
    executor = four.standalone.executor
    supervisor = executor.supervisor
    subgroups = list(executor.subgroups)

    async def one(number: int) -> tuple[str, PrefillTask | None]:
        name = SHORT if number % 5 else LONG
        await asyncio.sleep(chance.random() * (3 if number % 5 else 1))
        await supervisor.wait_ready()
        preempts = ""
        subgroup = chance.choice(subgroups)
        at_work = subgroups_of_tasks(executor)
        if at_work and chance.random() < 0.6:
            preempts, outer = chance.choice(list(at_work.items()))
            subgroup = chance.choice([inner for inner in subgroups if outer.contains(inner)])
        task = four.task(name, subgroup, chance.choice(KINDS))
        job = asyncio.create_task(four.standalone.prefill(task, preempts))
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random())
            job.cancel()
        try:
            await job
        except asyncio.CancelledError:
            return "cancelled", None
        except ServiceError as error:
            return error.reason, None
        return name, task

    async def kill() -> None:
        await asyncio.sleep(2)
        os.kill(chance.choice(worker_pids(supervisor)), signal.SIGKILL)

    epoch = supervisor.epoch
    async with asyncio.timeout(240):
        *found, _ = await asyncio.gather(*(one(n) for n in range(20)), kill())
        await supervisor.wait_ready()
        later = await asyncio.gather(*(one(n) for n in range(20)))
    ways = {SHORT, LONG, "cancelled"}
    assert {how for how, _ in found} <= ways | {Reason.RANK_DIED, Reason.STALE_GENERATION}
    assert {how for how, _ in later} <= ways
    assert supervisor.epoch == epoch + 1
    computed = [(name, task) for name, task in later if task is not None]
    assert len(computed) > 8
    for name, task in computed:
        four.check(name, task)
    assert is_idle(executor)
