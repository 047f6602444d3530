"""Ranks and their bounds on KV memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from prefill_service.config import EngineConfig
from prefill_service.engine.spec import kv_budget
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.plan import FrameSampling
from tests.engine.harness import running_group


async def test_a_video_beyond_the_working_bytes_fails_before_any_work(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    model = checkpoint("qwen3_vl")
    video = make_video(seconds=1.0, fps=5, width=130, height=98)
    async with running_group(model, tmp_path, 2, kv_working_bytes=200_000) as harness:
        generation = harness.group.generation
        budget = kv_budget(
            EngineConfig(kv_working_bytes=200_000), harness.planner.checkpoint, "float32", "cpu"
        )
        long, _ = await harness.plan(video, FrameSampling(fps=5.0))
        short, _ = await harness.plan(video, FrameSampling(num_frames=2))
        assert short.num_tokens <= budget.fitting_tokens < long.num_tokens
        with pytest.raises(ServiceError, match=r"engine\.kv_working_bytes is 200000") as caught:
            await harness.prefill(harness.task(video, long))
        assert caught.value.reason is Reason.KV_POOL_FULL
        assert harness.progress == []
        task = harness.task(video, short)
        await harness.prefill(task)
        assert not harness.read_kv(task).isnan().any()
        assert harness.group.generation == generation


def test_defaults_divide_the_memory(checkpoint: Callable[..., Path]) -> None:
    opened = open_checkpoint(str(checkpoint("qwen3_vl")))
    one, four = (kv_budget(EngineConfig(ranks=r), opened, "float32", "cpu") for r in (1, 4))
    assert one.working_bytes // 4 == four.working_bytes
    assert one.working_bytes == one.pool_bytes == four.pool_bytes
    assert not one.offload
