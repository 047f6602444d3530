"""One attempt at one prefix: room in the pool, the manifest, the ranks, the result."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.engine.messages import BaselineTask, PrefillTask, Progress
from prefill_service.kv.handoff import HandoffParams
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.attention_summary import (
    AttentionDetail,
    AttentionSummary,
    detail,
    summarize,
)
from prefill_service.scheduling.exchange_planner import ExchangePlanner
from prefill_service.scheduling.job import PrefillResult, PrefillSpec
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.prefix_cache import PrefixCache
from prefill_service.scheduling.traces import TraceBook
from prefill_service.video.index import VideoIndex

if TYPE_CHECKING:
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.video.store import HeldVideo

logger = logging.getLogger(__name__)


class PrefillRunner:
    """Computes prefixes, several at once if need be, and enters them into the registry.

    Args:
        engine_id: uuid of this service run, part of every manifest.
        metrics: told of each prefill.
        traces: told of what was done when.
        exchanges: chooses each prefix's exchange; without it, it is the group's.
    """

    def __init__(
        self,
        group: PrefillExecutor,
        prefixes: PrefixCache,
        engine_id: str,
        planning: Admission,
        metrics: Metrics,
        traces: TraceBook,
        exchanges: ExchangePlanner | None = None,
    ) -> None:
        self._group = group
        self._prefixes = prefixes
        self._engine_id = engine_id
        self._planning = planning
        self._metrics = metrics
        self._traces = traces
        self._exchanges = exchanges

    async def run(
        self,
        job_id: str,
        plan: PrefixPlan,
        spec: PrefillSpec,
        video: HeldVideo,
        team: Subgroup,
        over: str,
        on_start: Callable[[], None],
        on_progress: Callable[[Progress], None],
    ) -> tuple[PrefillResult, AttentionDetail | None]:
        """Compute a prefix; ``on_start`` is called when the ranks begin.

        Args:
            team: the ranks that compute it.
            over: job that is paused for it, if any (``PrefillExecutor.prefill``).

        Cancelling this coroutine stops the ranks and frees the pages.

        Returns:
            The result, and all that is kept of the attention report; of a comparison, nothing.

        Raises:
            ServiceError: KV_POOL_FULL, or why the ranks failed.
        """
        index = await asyncio.to_thread(VideoIndex.load, video.index_path)
        used = self._planning.policy(spec.attention)
        comparison = await self._planning.comparison(spec, plan)
        profile = self._planning.profile(spec)
        with self._traces.span(job_id, "make room"):
            exchange = await self._exchange(plan, used, comparison, team)
            manifest, kv_bytes = await self._reserve(
                plan, profile, exchange, comparison, team, used
            )
        self._prefixes.add(manifest, kv_bytes)
        on_start()
        task = PrefillTask(
            job_id, plan, manifest, str(video.path), str(video.index_path),
            team, used, exchange, comparison,
        )  # fmt: skip
        attention, report = None, None
        try:
            with self._traces.span(job_id, "ranks"):
                outcome = await self._group.prefill(task, on_progress, over)
            self._traces.add_ranks(job_id, outcome.spans)
            if comparison is None:
                attention = summarize(spec.attention, outcome.attention)
                report = detail(attention, outcome.attention, plan, index)
                if self._exchanges is not None:
                    self._exchanges.learn(plan, used, exchange, outcome, team.size)
            prefix = self._prefixes.complete(plan.prefix_id)
        except BaseException:
            self._prefixes.discard(manifest)
            raise
        method = "" if comparison is None else comparison.mode.method
        self._metrics.prefilled(plan.num_tokens, outcome, attention, method, team.size)
        stages = {str(stage): round(value, 2) for stage, value in outcome.stage_seconds.items()}
        logger.info(
            "%s: %d tokens in %.2f s on %s (paused for %.2f s), slowest rank's stages %s, "
            "%d bytes received from other ranks, attention %s%s",
            job_id, plan.num_tokens, outcome.seconds, team, outcome.paused_s, stages,
            outcome.bytes_received, profile, _figures(attention),
        )  # fmt: skip
        result = _result(plan, manifest, kv_bytes, prefix.standing, attention)
        moved = replace(
            result,
            exchange=method or str(exchange),
            communication=outcome.communication,
        )
        return moved, report

    async def _exchange(
        self,
        plan: PrefixPlan,
        policy: AttentionPolicy,
        comparison: BaselineTask | None,
        team: Subgroup,
    ) -> ExchangeChoice:
        if self._exchanges is None or comparison is not None:
            return self._group.exchange_of(team)
        await self._group.wait_ready()  # the first choice needs the ranks' probe
        return await asyncio.to_thread(self._exchanges.choose, plan, policy, team.size)

    async def _reserve(
        self,
        plan: PrefixPlan,
        profile: str,
        exchange: ExchangeChoice,
        comparison: BaselineTask | None,
        team: Subgroup,
        policy: AttentionPolicy,
    ) -> tuple[Manifest, int]:
        """Wait for the group and for room; nothing is awaited after the group was seen alive."""
        while True:
            await self._group.wait_ready()
            layout = self._group.layout
            runs = self._group.shard_map(plan, exchange, comparison, team, policy)
            pages = sum(layout.pages_for(run.end_token - run.start_token) for run in runs)
            await self._prefixes.make_room(pages * layout.page_bytes, prefix_id=plan.prefix_id)
            if self._group.ready:
                break
        manifest = Manifest(
            prefix_id=plan.prefix_id,
            engine_id=self._engine_id,
            generation=self._group.generation,
            model_fingerprint=self._planning.fingerprint,
            layout=layout,
            num_tokens=plan.num_tokens,
            runs=runs,
            endpoints=self._group.endpoints,
            token_ids_hash=hash_token_ids(plan.token_ids),
            position_delta=plan.position_delta,
            profile=profile,
        )
        return manifest, pages * layout.page_bytes


def _figures(attention: AttentionSummary | None) -> str:
    if attention is None:
        return ""
    total = attention.total
    return f", density {total.density:.3f}, kept mass {total.kept_mass_mean:.4f}"


def _result(
    plan: PrefixPlan,
    manifest: Manifest,
    kv_bytes: int,
    lease_id: str,
    attention: AttentionSummary | None,
) -> PrefillResult:
    params = HandoffParams(manifest, lease_id, report_to="").to_kv_transfer_params()
    return PrefillResult(
        prefix_id=plan.prefix_id,
        prefix_tokens=plan.num_tokens,
        video_tokens=plan.num_video_tokens,
        frames=len(plan.frame_indices),
        grid_thw=plan.patch_grid,
        position_delta=plan.position_delta,
        shards=tuple((run.start_token, run.end_token, run.rank) for run in manifest.runs),
        kv_bytes=kv_bytes,
        kv_transfer_params_json=json.dumps(params, separators=(",", ":")),
        manifest_json=manifest.to_json(),
        attention=attention,
    )
