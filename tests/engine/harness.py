"""A rank group outside the service: probe, plan, prefill, read the pages back."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.messages import BaselineTask, PrefillTask, Progress
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.kv.page_client import PageClient
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video

EXACT = resolve_policy(Quality.EXACT)


@dataclass
class Harness:
    """One group and what is needed to give it work."""

    group: PrefillExecutor
    planner: PrefixPlanner
    folder: Path
    progress: list[Progress] = field(default_factory=list)

    async def plan(
        self, video: Path, sampling: FrameSampling | None = None
    ) -> tuple[PrefixPlan, VideoIndex]:
        """Probe and plan; the index is saved beside the pages' sockets."""
        index = await index_video(video, VideoConfig())
        index.save(self.index_path(video))
        plan = self.planner.plan(index, video.name, sampling or FrameSampling(), "")
        return plan, index

    def index_path(self, video: Path) -> Path:
        return self.folder / f"{video.stem}.npz"

    def task(
        self,
        video: Path,
        plan: PrefixPlan,
        exchange: ExchangeChoice | None = None,
        comparison: BaselineTask | None = None,
        team: Subgroup | None = None,
        policy: AttentionPolicy = EXACT,
    ) -> PrefillTask:
        team = team or self.group.everyone
        exchange = exchange or self.group.exchange_of(team)
        manifest = Manifest(
            prefix_id=plan.prefix_id,
            engine_id="test",
            generation=self.group.generation,
            model_fingerprint=self.planner.checkpoint.fingerprint,
            layout=self.group.layout,
            num_tokens=plan.num_tokens,
            runs=self.group.shard_map(plan, exchange, comparison, team, policy),
            endpoints=self.group.endpoints,
            token_ids_hash=hash_token_ids(plan.token_ids),
            position_delta=plan.position_delta,
        )
        job_id = f"job_{uuid.uuid4().hex}"
        index = str(self.index_path(video))
        return PrefillTask(
            job_id, plan, manifest, str(video), index, team, policy, exchange, comparison
        )

    async def prefill(self, task: PrefillTask, over: str = "") -> PrefillOutcome:
        self.group.grant(task.plan.prefix_id, "lease", 60.0)
        return await self.group.prefill(task, self.progress.append, over)

    def read_kv(self, task: PrefillTask) -> torch.Tensor:
        """All pages back into [layers, 2, tokens, kv_heads, head_dim]."""
        layout, plan = self.group.layout, task.plan
        shape = (layout.num_layers, 2, plan.num_tokens, layout.num_kv_heads, layout.head_dim)
        kv = torch.full(shape, torch.nan, dtype=getattr(torch, layout.dtype))
        with PageClient(task.manifest, "lease", 30.0) as client:
            for batch in client.fetch(0, plan.num_tokens):
                for page, data in zip(batch.pages, batch.data, strict=True):
                    end = page.start_token + page.num_tokens
                    kv[:, :, page.start_token : end] = data[:, :, : page.num_tokens]
        return kv

    def frames(self, video: Path, plan: PrefixPlan) -> np.ndarray:
        """The plan's frames, [frames, height, width, 3]."""
        indices = plan.frame_indices.tolist()
        with FrameStream.open(video, self.index_path(video), indices, VideoConfig()) as stream:
            return np.stack(list(stream))


@asynccontextmanager
async def running_group(
    model: Path, folder: Path, ranks: int, **engine: object
) -> AsyncIterator[Harness]:
    """A started group; stopped on the way out. No test but its own waits for the probe."""
    engine.setdefault("sparse_from_tokens", 1 << 20)
    checkpoint = open_checkpoint(str(model))
    config = EngineConfig(model=str(model), ranks=ranks, threads_per_rank=1, **engine)  # type: ignore[arg-type]
    dtype = "float32" if config.dtype == "auto" else config.dtype
    group = PrefillExecutor(config, VideoConfig(), checkpoint, dtype, "cpu", folder)
    await group.start()
    try:
        yield Harness(group, PrefixPlanner(checkpoint, dtype), folder)
    finally:
        await group.stop()
