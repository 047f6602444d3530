"""Ranks and their bounds on KV memory."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.config import EngineConfig
from prefill_service.engine.resolve import kv_budget
from prefill_service.engine.spans import Stage
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.parallel.exchanges.catalog import ULYSSES
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from tests.support.engine_state import worker_pids
from tests.support.standalone_executor import standalone_executor


async def test_a_video_beyond_the_working_bytes_fails_before_any_work(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint("qwen3_vl")
    video = make_video(seconds=1.0, fps=5, width=130, height=98)
    async with standalone_executor(model, tmp_path, 2, kv_working_bytes=200_000) as standalone:
        epoch = standalone.supervisor.epoch
        budget = kv_budget(
            EngineConfig(kv_working_bytes=200_000),
            standalone.planner.checkpoint,
            "float32",
            device="cpu",
        )
        long, _ = await standalone.plan(video, FrameSampling(fps=5.0))
        short, _ = await standalone.plan(video, FrameSampling(num_frames=2))
        assert short.num_tokens <= budget.fitting_tokens < long.num_tokens
        with pytest.raises(ServiceError, match=r"engine\.kv_working_bytes is 200000") as caught:
            await standalone.prefill(standalone.task(video, long))
        assert caught.value.reason is Reason.KV_POOL_FULL
        assert standalone.progress == []
        task = standalone.task(video, short)
        await standalone.prefill(task)
        assert not standalone.read_kv(task).isnan().any()
        assert standalone.supervisor.epoch == epoch


async def offloading(
    model: Path, video: Path, folder: Path, epsilon: float, **engine: object
) -> tuple[torch.Tensor, PrefillOutcome]:
    """KV of one prefill with two ranks and chunks of two hundred tokens, sparse from 400 on."""
    options = {"chunk_tokens": 200, "sparse_from_tokens": 400, **engine}
    async with standalone_executor(model, folder, 2, **options) as standalone:
        plan, _ = await standalone.plan(video, FrameSampling(fps=8.0))
        policy = resolve_policy(epsilon=epsilon) if epsilon else resolve_policy(Quality.EXACT)
        task = standalone.task(video, plan, policy=policy)
        outcome = await standalone.prefill(task)
        return standalone.read_kv(task), outcome


@pytest.mark.parametrize("epsilon", [0, 0.6])
async def test_offloaded_keys_give_the_same_bits(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path, epsilon: float
) -> None:
    model = checkpoint("qwen3_vl", layers=5)  # of which four attend
    video = make_video(seconds=20.0, fps=10, width=160, height=120)
    expected, resident = await offloading(model, video, tmp_path / "a", epsilon)
    assert resident.offloaded == ()
    row = 2 * 2 * 64 * 4
    bound = 2 * row * expected.shape[2]  # of two layers
    got, outcome = await offloading(
        model, video, tmp_path / "b", epsilon, kv_offload="host", kv_working_bytes=bound
    )
    assert torch.equal(got, expected)
    assert outcome.attention.density == resident.attention.density
    assert (outcome.attention.density < 1) == (epsilon > 0)
    assert len(outcome.offloaded) == 2
    for report in outcome.offloaded:
        assert report.high_water_bytes == bound
        assert report.offloaded_bytes == 4 * bound // 2  # all of the layers that attend
        assert report.moved_bytes > report.offloaded_bytes


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_a_rank_that_cannot_offload_fails_the_job_only(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path, when: str
) -> None:
    model = checkpoint("qwen3_vl", layers=5)
    video = make_video(seconds=20.0, fps=10, width=160, height=120)
    async with standalone_executor(
        model, tmp_path, 2, chunk_tokens=60, kv_offload="host", kv_working_bytes=5_000_000
    ) as standalone:
        plan, _ = await standalone.plan(video, FrameSampling(fps=8.0))
        layer = plan.num_tokens * standalone.executor.kv_layout.token_bytes // 5
        epoch = standalone.supervisor.epoch
        rank = worker_pids(standalone.supervisor)[1]

        def limit_files(size: int) -> None:
            resource.prlimit(rank, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        if when == "before":
            limit_files(3 * layer)  # pages fit, four layers in a file do not
        job = asyncio.create_task(standalone.prefill(standalone.task(video, plan)))
        if when == "meanwhile":
            while not any(p.stage is Stage.PREFILL for p in standalone.progress):
                await asyncio.sleep(0.01)
            limit_files(layer)
        said = "no space for" if when == "before" else "offloaded KV in .* cannot be moved"
        with pytest.raises(ServiceError, match=f"{said}.*: File too large") as caught:
            await asyncio.wait_for(job, 60)
        failed = Reason.KV_POOL_FULL if when == "before" else Reason.PREFILL_FAILED
        assert caught.value.reason is failed
        limit_files(resource.RLIM_INFINITY)
        task = standalone.task(video, plan)
        outcome = await standalone.prefill(task)
        assert len(outcome.offloaded) == 2
        assert not standalone.read_kv(task).isnan().any()
        assert standalone.supervisor.epoch == epoch


async def test_only_gather_offloads(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        ServiceError, match=r"'host' is not accepted with engine\.exchange = 'ring'"
    ) as caught:
        async with standalone_executor(
            checkpoint("qwen3_vl"), tmp_path, 2, exchange="ring", kv_offload="host"
        ):
            pass
    assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.mark.parametrize(
    ("exchange", "ranks", "kv_shards"),
    [
        ("gather", 4, 1),
        ("demand", 4, 1),
        ("ring", 4, 4),
        ("ulysses", 2, 2),
        ("ulysses", 3, 2),
        ("ulysses", 4, 2),
        ("usp", 4, 4),
    ],
)
def test_exchanges_that_divide_the_keys_need_a_share(
    checkpoint: Callable[..., Path], exchange: str, ranks: int, kv_shards: int
) -> None:
    """Two KV heads: of four ranks that divide heads, two have the same one."""
    opened = open_checkpoint(str(checkpoint("qwen3_vl")))
    engine = EngineConfig(ranks=ranks, exchange=exchange)
    assert kv_budget(engine, opened, "float32", device="cpu").kv_shards == kv_shards


def test_the_rank_with_the_most_heads_counts() -> None:
    """Of three ranks the one with query heads 11 to 21 of 32 reads four KV heads of eight."""
    assert ExchangeChoice(ULYSSES, 3).kv_shards(3, 32, 8) == 2


def test_defaults_divide_the_memory(checkpoint: Callable[..., Path]) -> None:
    opened = open_checkpoint(str(checkpoint("qwen3_vl")))
    one, four = (kv_budget(EngineConfig(ranks=r), opened, "float32", device="cpu") for r in (1, 4))
    assert one.working_bytes // 4 == four.working_bytes
    assert one.working_bytes == one.pool_bytes == four.pool_bytes
    assert not one.offload
