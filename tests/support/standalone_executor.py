"""An executor outside the service: plan a video, prefill it, read the pages back."""

from __future__ import annotations

import atexit
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.messages import BaselineTask, PrefillTask, Progress
from prefill_service.engine.processes.fork_server import ForkServer
from prefill_service.engine.supervisor import WorkerSupervisor
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.kv.vllm_connector.page_client import PageClient
from prefill_service.models.checkpoint import Checkpoint, open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.exchanges.catalog import PASS_Q
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video

EXACT = resolve_policy(Quality.EXACT)


@dataclass
class StandaloneExecutor:
    """An executor and what is needed to give it tasks."""

    executor: PrefillExecutor
    planner: PrefixPlanner
    folder: Path
    progress: list[Progress] = field(default_factory=list)

    @property
    def supervisor(self) -> WorkerSupervisor:
        return self.executor.supervisor

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
        *,
        baseline: BaselineTask | None = None,
        subgroup: Subgroup | None = None,
        policy: AttentionPolicy = EXACT,
    ) -> PrefillTask:
        subgroup = subgroup or self.executor.all_ranks
        exchange = exchange or self.executor.exchange_of(subgroup)
        whole_units = self.executor.has_whole_units(plan, exchange, policy)
        if baseline is None:
            runs = self.executor.shard_map(plan, exchange, subgroup, whole_units=whole_units)
        else:
            runs = self.executor.baseline_shard_map(plan, baseline, subgroup)
        manifest = Manifest(
            prefix_id=plan.prefix_id,
            engine_id="test",
            epoch=self.supervisor.epoch,
            model_fingerprint=self.planner.checkpoint.fingerprint,
            layout=self.executor.kv_layout,
            num_tokens=plan.num_tokens,
            runs=runs,
            endpoints=self.supervisor.endpoints,
            token_ids_hash=hash_token_ids(plan.token_ids),
            position_delta=plan.position_delta,
        )
        return PrefillTask(
            job_id=f"job_{uuid.uuid4().hex}",
            plan=plan,
            manifest=manifest,
            video_path=str(video),
            index_path=str(self.index_path(video)),
            subgroup=subgroup,
            policy=policy,
            exchange=exchange,
            whole_units=whole_units,
            baseline=baseline,
        )

    def text_task(self, base: PrefillTask, plan: PrefixPlan) -> PrefillTask:
        """What computes the text that ``plan`` has after the prefix of another task."""
        manifest = replace(
            base.manifest,
            prefix_id=plan.prefix_id,
            num_tokens=plan.num_tokens,
            runs=self.executor.text_shard_map(base.manifest, plan, base.subgroup),
            token_ids_hash=hash_token_ids(plan.token_ids),
            start_token=base.plan.num_tokens,
        )
        return replace(
            base,
            job_id=f"job_{uuid.uuid4().hex}",
            plan=plan,
            manifest=manifest,
            policy=EXACT,
            exchange=ExchangeChoice(PASS_Q),
            whole_units=False,
            base=base.manifest,
        )

    async def prefill(self, task: PrefillTask, preempts: str = "") -> PrefillOutcome:
        self.executor.grant_lease(task.plan.prefix_id, "lease", 60.0)
        return await self.executor.prefill(task, self.progress.append, preempts)

    def read_kv(self, task: PrefillTask) -> torch.Tensor:
        """All pages back into [layers, 2, tokens, kv_heads, head_dim]."""
        layout = self.executor.kv_layout
        tokens = task.plan.num_tokens
        shape = (layout.num_layers, 2, tokens, layout.kv_heads, layout.head_dim)
        kv = torch.full(shape, torch.nan, dtype=layout.torch_dtype)
        with PageClient(task.manifest, "lease", 30.0) as client:
            for batch in client.fetch(0, tokens):
                for page, data in zip(batch.pages, batch.data, strict=True):
                    end = page.start_token + page.num_tokens
                    kv[:, :, page.start_token : end] = data[:, :, : page.num_tokens]
        return kv

    def frames(self, video: Path, plan: PrefixPlan) -> np.ndarray:
        """The plan's frames, [frames, height, width, 3]."""
        indices = plan.frame_indices.tolist()
        with FrameStream.open(video, self.index_path(video), indices, VideoConfig()) as stream:
            return np.stack(list(stream))


@cache
def shared_fork_server() -> ForkServer:
    """One for all executors of this process: torch is imported once for all their ranks."""
    server = ForkServer()
    atexit.register(server.close)
    return server


@asynccontextmanager
async def standalone_executor(
    model: Path | Checkpoint,
    folder: Path,
    ranks: int,
    *,
    fork_server: ForkServer | None = None,
    **engine: object,
) -> AsyncIterator[StandaloneExecutor]:
    """A started executor, stopped on the way out. No test but its own waits for the probe."""
    engine.setdefault("sparse_from_tokens", 1 << 20)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    config = EngineConfig(model=str(checkpoint.path), ranks=ranks, threads_per_rank=1, **engine)  # type: ignore[arg-type]
    dtype = "float32" if config.dtype == "auto" else config.dtype
    executor = PrefillExecutor(
        config,
        VideoConfig(),
        checkpoint,
        dtype,
        device="cpu",
        runtime_dir=folder,
        fork_server=fork_server or shared_fork_server(),
    )
    await executor.supervisor.start()
    try:
        yield StandaloneExecutor(executor, PrefixPlanner(checkpoint, dtype), folder)
    finally:
        await executor.supervisor.stop()
