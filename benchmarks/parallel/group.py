"""An executor outside the service: the KV of a video's prefix, read back from the ranks."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.messages import PrefillTask
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.kv.vllm_connector.page_client import PageClient
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.exchanges.catalog import ExchangeKind
from prefill_service.parallel.exchanges.registry import choose_exchange
from prefill_service.video.indexer import index_video

NEVER = 1 << 30
"""More keys than a prompt has: with it as ``sparse_from_tokens`` attention stays dense."""


@dataclass(frozen=True, slots=True)
class Case:
    """How to compute a prefix: exactly, unless told otherwise."""

    kind: ExchangeKind
    policy: AttentionPolicy = field(default_factory=lambda: resolve_policy(Quality.EXACT))


@dataclass(frozen=True, slots=True)
class Prefix:
    """What ranks computed: KV [layers, 2, tokens, kv_heads, head_dim] on the host, and how."""

    kv: Tensor
    outcome: PrefillOutcome


async def prefill_video(
    config: EngineConfig, video: Path, folder: Path, *, cases: Sequence[Case], fps: float = 4.0
) -> list[Prefix]:
    """One prefill per case, by an executor that starts, computes and leaves.

    Args:
        config: with a dtype and a device that are named, not ``auto``.
        folder: for the index and sockets; short, since Unix socket paths are.
        fps: frames sampled a second.
    """
    checkpoint = open_checkpoint(config.model)
    index = await index_video(video, VideoConfig())
    index.save(folder / "index.npz")
    plan = PrefixPlanner(checkpoint, config.dtype).plan(
        index, video.name, FrameSampling(fps=fps), ""
    )
    executor = PrefillExecutor(
        config,
        VideoConfig(),
        checkpoint,
        config.dtype,
        device=config.device,
        runtime_dir=folder,
    )
    found = []
    await executor.supervisor.start()
    try:
        for case in cases:
            exchange = choose_exchange(
                case.kind,
                config.ranks,
                q_heads=checkpoint.shape.q_heads,
                kv_heads=checkpoint.shape.kv_heads,
            )
            whole_units = executor.has_whole_units(plan, exchange, case.policy)
            manifest = Manifest(
                prefix_id=plan.prefix_id,
                engine_id="benchmark",
                epoch=executor.supervisor.epoch,
                model_fingerprint=checkpoint.fingerprint,
                layout=executor.kv_layout,
                num_tokens=plan.num_tokens,
                runs=executor.shard_map(
                    plan, exchange, executor.all_ranks, whole_units=whole_units
                ),
                endpoints=executor.supervisor.endpoints,
                token_ids_hash=hash_token_ids(plan.token_ids),
                position_delta=plan.position_delta,
            )
            task = PrefillTask(
                job_id=f"job_{uuid.uuid4().hex}",
                plan=plan,
                manifest=manifest,
                video_path=str(video),
                index_path=str(folder / "index.npz"),
                subgroup=executor.all_ranks,
                policy=case.policy,
                exchange=exchange,
                whole_units=whole_units,
            )
            executor.grant_lease(plan.prefix_id, "lease", 600.0)
            outcome = await executor.prefill(task, lambda progress: None)
            found.append(Prefix(_read(manifest), outcome))
            executor.drop_prefix(plan.prefix_id)
    finally:
        await executor.supervisor.stop()
    return found


def _read(manifest: Manifest) -> Tensor:
    layout = manifest.layout
    tokens = manifest.num_tokens
    shape = (layout.num_layers, 2, tokens, layout.kv_heads, layout.head_dim)
    kv = torch.full(shape, torch.nan, dtype=layout.torch_dtype)
    with PageClient(manifest, "lease", 60.0) as client:
        for batch in client.fetch(0, tokens):
            for page, data in zip(batch.pages, batch.data, strict=True):
                place = slice(page.start_token, page.start_token + page.num_tokens)
                kv[:, :, place] = data[:, :, : page.num_tokens]
    return kv
