"""Baselines in real workers: what of their KV must be exact is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prefill_service.engine.baseline_prefill import patch_shares
from prefill_service.engine.messages import BaselineTask
from prefill_service.engine.shard_map import baseline_split
from prefill_service.engine.spans import Stage
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.parallel.baselines.methods import BaselineName, baseline_method
from tests.oracles.transformers_forward import prefix_kv, processor_inputs
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

SPAVA = BaselineName.SPAVA
STAR = BaselineName.STAR
APB = BaselineName.APB
VIDEO = {"seconds": 15.0, "fps": 10, "width": 160, "height": 120}


def baseline_task(
    standalone: StandaloneExecutor,
    plan: PrefixPlan,
    method: BaselineName,
    *,
    anchor: int | None,
    passing: int | None,
    question: str = "What is it?",
) -> BaselineTask:
    ids = standalone.planner.prompt_token_ids(plan, [("user", question)])[plan.num_tokens :]
    ranks = len(standalone.supervisor.endpoints)
    how = baseline_method(
        method, plan.num_tokens, ranks, anchor_tokens=anchor, passing_tokens=passing
    )
    return BaselineTask(how, tuple(ids))


async def kv_of(
    standalone: StandaloneExecutor, video: Path, plan: PrefixPlan, baseline: BaselineTask
) -> torch.Tensor:
    task = standalone.task(video, plan, baseline=baseline)
    outcome = await standalone.prefill(task)
    assert (outcome.bytes_received > 0) == (len(task.manifest.endpoints) > 1)
    kv = standalone.read_kv(task)
    standalone.executor.drop_prefix(plan.prefix_id)
    return kv


def error(kv: torch.Tensor, expected: torch.Tensor) -> float:
    return float((kv - expected).norm() / expected.norm())


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
async def test_kv_is_exact_where_the_method_is(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path, ranks: int
) -> None:
    model = checkpoint("qwen3_vl" if ranks % 2 else "qwen2_5_vl")
    async with standalone_executor(model, tmp_path, ranks, chunk_tokens=70) as standalone:
        video = make_video(**VIDEO)
        plan, index = await standalone.plan(video, FrameSampling(fps=4.0))
        text = standalone.planner.chat.prefix("")
        inputs = processor_inputs(model, standalone.frames(video, plan), plan, index, text=text)
        exact = prefix_kv(model, inputs, plan, torch.float64)

        everything = baseline_task(standalone, plan, SPAVA, anchor=40, passing=1 << 20)
        assert error(await kv_of(standalone, video, plan, everything), exact) < 1e-5
        found = {}
        for method, passing in ((SPAVA, 6), (STAR, None), (APB, 6)):
            for question in ("What is it?", "Who runs from the left to the right?"):
                baseline = baseline_task(
                    standalone, plan, method, anchor=40, passing=passing, question=question
                )
                kv = await kv_of(standalone, video, plan, baseline)
                found[method, question] = kv
                _, end = baseline_split(plan, baseline, ranks).block(0)
                assert error(kv[0], exact[0]) < 1e-5  # before any attention
                assert error(kv[:, :, :end], exact[:, :, :end]) < 1e-5  # one rank's view is whole
                if ranks == 1:
                    assert error(kv, exact) < 1e-5
                else:
                    assert error(kv[1:, :, end:], exact[1:, :, end:]) > 1e-3
        for method in (SPAVA, APB, STAR):
            one, other = (kv for (which, _), kv in found.items() if which is method)
            # Each question makes another prefix, but for Star, which never asks.
            assert torch.equal(one, other) == (ranks == 1 or method is STAR)
        done = {(p.rank, p.stage): p for p in standalone.progress}
        assert all(
            done[rank, stage].done == done[rank, stage].total > 0
            for rank in range(ranks)
            for stage in Stage
        )


async def test_errors_and_cancelling_stop_all_ranks(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    async with standalone_executor(
        checkpoint("qwen3_vl"), tmp_path, 2, chunk_tokens=70
    ) as standalone:
        video = make_video(**VIDEO)
        plan, _ = await standalone.plan(video, FrameSampling(fps=4.0))
        baseline = baseline_task(standalone, plan, SPAVA, anchor=40, passing=6)
        task = standalone.task(video, plan, baseline=baseline)
        running = asyncio.create_task(standalone.prefill(task))
        while not standalone.progress:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(b"no video")
        standalone.index_path(broken).write_bytes(standalone.index_path(video).read_bytes())
        with pytest.raises(ServiceError) as info:
            await standalone.prefill(standalone.task(broken, plan, baseline=baseline))
        assert info.value.reason is Reason.NOT_A_VIDEO
        assert (
            not (await kv_of(standalone, video, plan, baseline)).isnan().any()
        )  # the workers live on


def test_what_is_encoded_at_once_is_bounded() -> None:
    ends = np.arange(1, 13) * 20
    shares = patch_shares([(0, 40), (100, 200)], ends, 60)
    assert [share.ranges for share in shares] == [[(0, 40)], [(100, 160)], [(160, 200)]]
    assert [share.num_patches for share in patch_shares([(0, 40)], ends, 1)] == [1, 1]
