"""Real rank processes: equal to transformers' forward, and what happens when they are hurt."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from torch import Tensor

from prefill_service.engine.spans import Stage
from prefill_service.engine.worker import NICENESS
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan, extend_plan
from prefill_service.parallel.exchanges.catalog import EXCHANGES, GATHER, ULYSSES, ExchangeKind
from prefill_service.parallel.exchanges.registry import choose_exchange
from prefill_service.video.geometry import FrameSize
from prefill_service.video.index import VideoIndex
from tests.oracles.transformers_forward import prefix_kv, processor_inputs
from tests.support.engine_state import worker_pids
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

VIDEOS = [
    {"seconds": 0.2, "fps": 5, "width": 96, "height": 64},  # one frame
    {"seconds": 1.0, "fps": 5, "width": 130, "height": 98},  # odd number of frames
    {"seconds": 15.0, "fps": 10, "width": 160, "height": 120},  # several chunks
]


HEADS = 4
KV_HEADS = 2
FAMILIES = ["qwen3_vl", "qwen2_5_vl"]
CASES = [(family, ranks) for family in FAMILIES for ranks in (1, 2, 3, 4)]
CASES.append(("qwen3_vl", 5))  # the first odd number of ranks with more than two disjoint rings


class Oracle:
    """What transformers computes, once for each checkpoint, video and text."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str, str], tuple[list[int], Tensor, Tensor]] = {}

    def compute(
        self,
        standalone: StandaloneExecutor,
        video: Path,
        plan: PrefixPlan,
        index: VideoIndex,
        *,
        question: str = "",
    ) -> tuple[list[int], Tensor, Tensor]:
        """Token ids of a prefix and the text after it, with their KV in float64 and float32."""
        model = standalone.planner.checkpoint.path
        key = (model, plan.prefix_id, question)
        if key not in self._known:
            text = standalone.planner.chat.prefix("") + question
            frames = standalone.frames(video, plan)
            inputs = processor_inputs(model, frames, plan, index, text=text)
            token_ids = inputs["input_ids"][0].tolist()
            whole = extend_plan(plan, token_ids[plan.num_tokens :]) if question else plan
            exact, theirs = (
                prefix_kv(model, inputs, whole, dtype) for dtype in (torch.float64, torch.float32)
            )
            self._known[key] = token_ids, exact, theirs
        return self._known[key]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def assert_as_close(found: Tensor, exact: Tensor, theirs: Tensor, case: str) -> None:
    """As close to float64 as transformers' own float32 is."""
    off = found - exact
    allowed = theirs - exact
    assert off.norm() <= 1.2 * allowed.norm() <= 1e-5 * exact.norm(), case
    assert off.abs().max() <= 1.5 * allowed.abs().max(), case


def exchanges_of(family: str, ranks: int, video: int) -> list[ExchangeKind]:
    """The exchanges that compute a video; all of them for the first family.

    Exchanges do not depend on the family. For others each has one video on each number of ranks,
    so that every two of family, exchange, ranks and video meet.
    """
    kinds = [kind for kind in EXCHANGES if kind != ULYSSES or ranks <= HEADS]
    if family == FAMILIES[0]:
        return kinds  # without what is refused: test_more_ranks_than_query_heads
    return [kind for i, kind in enumerate(kinds) if (i + ranks) % len(VIDEOS) == video]


def test_every_two_of_exchange_ranks_and_video_meet_in_each_family() -> None:
    ranks = (1, 2, 3, 4)
    videos = range(len(VIDEOS))
    for family in FAMILIES:
        met = [
            (kind, count, video)
            for count, video in itertools.product(ranks, videos)
            for kind in exchanges_of(family, count, video)
        ]
        assert {(kind, count) for kind, count, _ in met} == {*itertools.product(EXCHANGES, ranks)}
        assert {(kind, video) for kind, _, video in met} == {*itertools.product(EXCHANGES, videos)}
        assert {(count, video) for _, count, video in met} == {*itertools.product(ranks, videos)}


@pytest.mark.parametrize(("family", "ranks"), CASES)
async def test_kv_equals_transformers(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    oracle: Oracle,
    tmp_path: Path,
    family: str,
    ranks: int,
) -> None:
    async with standalone_executor(
        checkpoint(family), tmp_path, ranks, chunk_tokens=70
    ) as standalone:
        for number, arguments in enumerate(VIDEOS):
            video = make_video(**arguments)
            plan, index = await standalone.plan(video, FrameSampling(fps=4.0))
            token_ids, exact, theirs = oracle.compute(standalone, video, plan, index)
            assert token_ids[: plan.num_tokens] == plan.token_ids.tolist()
            for kind in exchanges_of(family, ranks, number):
                task = standalone.task(
                    video, plan, choose_exchange(kind, ranks, q_heads=HEADS, kv_heads=KV_HEADS)
                )
                outcome = await standalone.prefill(task)
                case = f"{kind}, {arguments}, {plan.num_tokens} tokens"
                assert_as_close(standalone.read_kv(task), exact, theirs, case)
                assert outcome.attention.density == 1.0
                assert ("agree" in outcome.communication) == (ranks > 1)
                standalone.executor.drop_prefix(plan.prefix_id)
                if kind == GATHER:
                    # every rank receives the others' K and V of all layers that attend, once
                    layout = standalone.executor.kv_layout
                    moved = (layout.num_layers - 1) * layout.token_bytes // layout.num_layers
                    assert outcome.bytes_received == moved * plan.num_tokens * (ranks - 1)


@pytest.mark.parametrize(("family", "ranks"), [("qwen3_vl", 1), ("qwen3_vl", 3), ("qwen2_5_vl", 2)])
async def test_text_after_a_prefix_equals_transformers(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    oracle: Oracle,
    tmp_path: Path,
    family: str,
    ranks: int,
) -> None:
    async with standalone_executor(
        checkpoint(family), tmp_path, ranks, chunk_tokens=70
    ) as standalone:
        for arguments, subgroup in zip(
            VIDEOS, (None, standalone.executor.subgroups[-1], None), strict=True
        ):  # one frame, of which most ranks have no part; one rank; several chunks
            video = make_video(**arguments)
            base, index = await standalone.plan(video, FrameSampling(fps=4.0))
            start = base.num_tokens
            token_ids, exact, theirs = oracle.compute(
                standalone, video, base, index, question="what is it that moves? " * 40
            )
            assert token_ids[:start] == base.token_ids.tolist()
            plan = extend_plan(base, token_ids[start:])
            first = standalone.task(video, base, subgroup=subgroup)
            await standalone.prefill(first)
            task = standalone.text_task(first, plan)
            standalone.progress.clear()
            await standalone.prefill(task)
            found = standalone.read_kv(task)
            assert found[:, :, :start].isnan().all()  # these pages are the other's
            assert_as_close(
                found[:, :, start:], exact[:, :, start:], theirs[:, :, start:], f"{arguments}"
            )
            done = {p.rank: p.done for p in standalone.progress if p.stage is Stage.PREFILL}
            assert sum(done.values()) == plan.num_tokens - start


async def test_text_after_a_prefix_that_is_gone_fails(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    async with standalone_executor(checkpoint("qwen3_vl"), tmp_path, 2) as standalone:
        video = make_video(**VIDEOS[1])
        base, _ = await standalone.plan(video)
        first = standalone.task(video, base)
        await standalone.prefill(first)
        standalone.executor.drop_prefix(base.prefix_id)
        with pytest.raises(ServiceError) as caught:
            await standalone.prefill(standalone.text_task(first, extend_plan(base, [5] * 20)))
        assert caught.value.reason is Reason.UNKNOWN_PREFIX
        await assert_works(standalone, make_video)


async def test_more_ranks_than_query_heads(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="degree of 5 exceeds the model's 4 query heads") as info:
        async with standalone_executor(checkpoint("qwen3_vl"), tmp_path, 5, exchange="ulysses"):
            pass
    assert info.value.reason is Reason.CONFIG_INVALID


async def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint("qwen3_vl")
    video = make_video(**VIDEOS[1])
    async with standalone_executor(
        model, tmp_path, 2, chunk_tokens=30, dtype="bfloat16"
    ) as standalone:
        plan, index = await standalone.plan(video, FrameSampling(fps=4.0))
        task = standalone.task(video, plan)
        await standalone.prefill(task)
        ours = standalone.read_kv(task)
        text = standalone.planner.chat.prefix("")
        inputs = processor_inputs(model, standalone.frames(video, plan), plan, index, text=text)
    exact, theirs = (prefix_kv(model, inputs, plan, d) for d in (torch.float32, torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() <= 1.5 * (theirs.float() - exact).norm()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[StandaloneExecutor]:
    folder = tmp_path_factory.mktemp("pair")
    model = checkpoint("qwen3_vl")
    async with standalone_executor(
        model, folder, 2, chunk_tokens=256, heartbeat_timeout_s=3.0
    ) as standalone:
        yield standalone


@pytest.fixture(scope="module")
def long_video(make_video: Callable[..., Path]) -> Path:
    return make_video(seconds=90, fps=10, width=320, height=240)


async def start_long(standalone: StandaloneExecutor, video: Path) -> asyncio.Task[object]:
    """A prefill that has begun to compute and is far from its end."""
    plan, _ = await standalone.plan(video)
    standalone.progress.clear()
    job = asyncio.create_task(standalone.prefill(standalone.task(video, plan)))
    async with asyncio.timeout(60):
        while not any(p.stage is Stage.PREFILL for p in standalone.progress):
            await asyncio.sleep(0.02)
    assert not job.done()
    return job


async def assert_works(standalone: StandaloneExecutor, make_video: Callable[..., Path]) -> None:
    video = make_video(**VIDEOS[1])
    plan, _ = await standalone.plan(video)
    await standalone.supervisor.wait_ready()
    task = standalone.task(video, plan)
    await standalone.prefill(task)
    assert not standalone.read_kv(task).isnan().any()


module_loop = pytest.mark.asyncio(loop_scope="module")


@module_loop
async def test_progress_per_stage_and_rank(
    pair: StandaloneExecutor, make_video: Callable[..., Path]
) -> None:
    video = make_video(**VIDEOS[2])
    plan, _ = await pair.plan(video)
    pair.progress.clear()
    await pair.prefill(pair.task(video, plan))
    last = {(p.stage, p.rank): p for p in pair.progress}
    assert all(p.done == p.total for p in last.values())
    totals = {stage: sum(last[stage, r].total for r in range(2)) for stage in Stage}
    assert totals == {
        Stage.DECODE: len(plan.frame_indices),
        Stage.VISION: plan.patch_grid[0],
        Stage.PREFILL: plan.num_tokens,
    }


@module_loop
async def test_frames_whose_size_the_index_missed_are_counted(
    pair: StandaloneExecutor, make_video: Callable[..., Path]
) -> None:
    video = make_video(**VIDEOS[1])
    plan, index = await pair.plan(video)
    assert (await pair.prefill(pair.task(video, plan))).unlisted_frames == 0
    missed = replace(index.geometry, sizes=(FrameSize(32, 32, index.frame_count),))
    replace(index, geometry=missed).save(pair.index_path(video))
    plan = replace(plan, prefix_id="pfx_missed_sizes")
    outcome = await pair.prefill(pair.task(video, plan))
    assert outcome.unlisted_frames == len(set(plan.frame_indices.tolist()))


@module_loop
async def test_answers_go_before_prefills_on_a_cpu(pair: StandaloneExecutor) -> None:
    workers = [psutil.Process(pid) for pid in worker_pids(pair.supervisor)]
    own = os.nice(0)
    assert {process.nice() for process in workers} == {own or NICENESS}


@module_loop
async def test_cancelling_stops_the_ranks_before_their_end(
    pair: StandaloneExecutor, long_video: Path, make_video: Callable[..., Path]
) -> None:
    epoch = pair.supervisor.epoch
    pids = worker_pids(pair.supervisor)
    job = await start_long(pair, long_video)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    last = {p.rank: p for p in pair.progress if p.stage is Stage.PREFILL}
    assert all(p.done < p.total for p in last.values())
    assert (pair.supervisor.epoch, worker_pids(pair.supervisor)) == (epoch, pids)
    await assert_works(pair, make_video)


@module_loop
@pytest.mark.parametrize(
    ("number", "reason", "named"),
    [
        (signal.SIGKILL, Reason.RANK_DIED, "rank 1 was killed by SIGKILL during job job_"),
        (signal.SIGSTOP, Reason.RANK_STALLED, "rank 1 sent no heartbeat for 3 s"),
    ],
)
async def test_a_hurt_rank_fails_the_job_and_the_workers_restart(
    pair: StandaloneExecutor,
    long_video: Path,
    make_video: Callable[..., Path],
    number: signal.Signals,
    reason: Reason,
    named: str,
) -> None:
    lost: list[int] = []
    pair.supervisor.add_loss_listener(lambda epoch, error: lost.append(epoch))
    epoch = pair.supervisor.epoch
    pids = worker_pids(pair.supervisor)
    job = await start_long(pair, long_video)
    os.kill(pids[1], number)
    with pytest.raises(ServiceError, match=named) as caught:
        await job
    assert caught.value.reason is reason
    assert lost == [epoch]
    assert pair.supervisor.epoch == epoch + 1
    await assert_works(pair, make_video)
    assert not set(pids) & set(worker_pids(pair.supervisor))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@module_loop
async def test_a_frame_that_cannot_be_decoded_fails_the_job_only(
    pair: StandaloneExecutor, long_video: Path, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    plan, _ = await pair.plan(long_video)
    task = pair.task(long_video, plan)
    data = bytearray(long_video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200_000] = bytes(200_000)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    epoch = pair.supervisor.epoch
    with pytest.raises(ServiceError, match="frame") as caught:
        await pair.prefill(replace(task, video_path=str(broken)))
    assert caught.value.reason is Reason.DECODE_FAILED
    assert pair.supervisor.epoch == epoch
    await assert_works(pair, make_video)


@module_loop
async def test_a_manifest_of_an_earlier_epoch_is_refused(
    pair: StandaloneExecutor, make_video: Callable[..., Path]
) -> None:
    video = make_video(**VIDEOS[1])
    plan, _ = await pair.plan(video)
    task = pair.task(video, plan)
    old = replace(task, manifest=replace(task.manifest, epoch=task.manifest.epoch + 7))
    with pytest.raises(ServiceError) as caught:
        await pair.prefill(old)
    assert caught.value.reason is Reason.STALE_GENERATION


async def test_a_start_that_hangs_is_given_up(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match=r"ranks \[0\] were not ready after 0.2 s") as caught:
        async with standalone_executor(checkpoint("qwen3_vl"), tmp_path, 1, start_timeout_s=0.2):
            pass
    assert caught.value.reason is Reason.RANK_STALLED


async def test_a_checkpoint_that_does_not_load_fails_the_start(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))
    judged = open_checkpoint(str(model))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])  # after it was judged, as a full disk may
    with pytest.raises(ServiceError, match="rank 0"):
        async with standalone_executor(judged, tmp_path, 1):
            pass


@module_loop
async def test_ranks_are_not_silent_while_the_front_end_stands_still(
    pair: StandaloneExecutor,
) -> None:
    """Their heartbeats wait unread: a suspended machine is no reason to start ranks anew."""
    supervisor = pair.executor.supervisor
    epoch = supervisor.epoch
    await asyncio.sleep(0)  # the watcher waits
    time.sleep(supervisor._engine.heartbeat_timeout_s + 1)  # noqa: ASYNC251 (the loop stands still)
    await asyncio.sleep(1.2)  # the watcher has looked
    assert supervisor.epoch == epoch
