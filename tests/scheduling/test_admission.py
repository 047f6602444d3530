"""Planning refuses what the ranks' memory could not hold, and says what would fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.job import PrefillSpec
from prefill_service.video.store import VideoStore
from tests.support.simulated_backends import FRAME_BYTES, LAYOUT, TOKENS_PER_FRAME, SimulatedPlanner


async def test_a_prefix_beyond_the_budget_is_refused_with_advice(
    tmp_path: Path, template: tuple[Path, str]
) -> None:
    source, video_id = template
    data = Path(shutil.copytree(source, tmp_path / "data"))
    videos = VideoStore.open(StorageConfig(data_dir=str(data)), VideoConfig())
    budget = KVBudget(LAYOUT, pool_bytes=10 * FRAME_BYTES, working_bytes=1)
    admission = Admission(videos, SimulatedPlanner(), lambda: 0, memory=budget)  # type: ignore[arg-type]
    try:
        plan = await admission.plan_prefix(PrefillSpec(video_id, FrameSampling(num_frames=10)))
        assert plan.num_tokens == 10 * TOKENS_PER_FRAME
        spec = PrefillSpec(video_id, FrameSampling(num_frames=12))
        for _ in range(2):  # planned, then taken from the cache
            with pytest.raises(
                ServiceError, match=r"or: num_frames=10 would fit \[KV_POOL"
            ) as caught:
                await admission.plan_prefix(spec)
            assert caught.value.reason is Reason.KV_POOL_FULL
            assert caught.value.metadata["needed_bytes"] == str(12 * FRAME_BYTES)
            assert caught.value.metadata["pool_bytes"] == str(10 * FRAME_BYTES)
    finally:
        admission.close()
        await videos.close()
