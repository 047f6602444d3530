"""One attempt at one prefix: room in the pool, the manifest, the ranks, the result."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.engine.messages import BaselineTask, PrefillTask, Progress
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import HandoffParams
from prefill_service.kv.manifest import Manifest, ShardRun, hash_token_ids
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.catalog import PASS_Q
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.attention_summary import (
    AttentionDetail,
    AttentionSummary,
    detail,
    summarize,
)
from prefill_service.scheduling.exchange_chooser import ExchangeChooser
from prefill_service.scheduling.job import PrefillResult, PrefillSpec
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.placement import Placement
from prefill_service.scheduling.prefix_cache import PrefixCache
from prefill_service.scheduling.traces import TraceStore
from prefill_service.video.index import VideoWarning, WarningReason

if TYPE_CHECKING:
    from prefill_service.engine.executor import PrefillExecutor
    from prefill_service.video.store import HeldVideo

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""Starts of a job. As many more do not count that ended with a rank that other jobs had."""

RESTARTABLE = frozenset(
    {
        Reason.RANK_DIED,
        Reason.RANK_STALLED,
        Reason.STALE_GENERATION,
        Reason.VIDEO_DECODER_KILLED,
    }
)
"""Processes were lost and have been replaced; the job may be tried again."""


class RetryPolicy:
    """Whether a job is started again that ended with the ranks under it.

    Args:
        subgroup: the ranks that it has each time.
    """

    def __init__(self, subgroup: Subgroup) -> None:
        self._subgroup = subgroup
        self._uncounted = 0  # starts that other jobs' ranks have ended

    def should_retry(self, error: ServiceError, starts: int) -> bool:
        """Whether to start the job again whose ``starts``-th start ended with ``error``."""
        if not self._may_have_caused(error):
            self._uncounted = min(self._uncounted + 1, MAX_ATTEMPTS)
        return error.reason in RESTARTABLE and starts < MAX_ATTEMPTS + self._uncounted

    def _may_have_caused(self, error: ServiceError) -> bool:
        """Whether the job may be why ranks failed: some of them are its own, or none is named."""
        ranks = json.loads(error.metadata.get("ranks", "[]"))
        if (rank := error.metadata.get("rank")) is not None:
            ranks.append(int(rank))
        return not ranks or any(rank in self._subgroup.members for rank in ranks)


@dataclass(frozen=True, slots=True)
class PrefillAttempt:
    """One attempt at a job's prefix.

    Attributes:
        placement: the ranks that compute it, and the job that is paused for it.
        base_id: the prefix that this one extends by text, if it does. Its ranks compute it.
        on_start: called when the ranks start.
        on_progress: called with each rank's progress.
    """

    job_id: str
    spec: PrefillSpec
    plan: PrefixPlan
    video: HeldVideo
    placement: Placement
    base_id: str
    on_start: Callable[[], None]
    on_progress: Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Way:
    """How a prefix is computed; the fields are those of ``PrefillTask``."""

    policy: AttentionPolicy
    exchange: ExchangeChoice
    baseline: BaselineTask | None = None
    base: Manifest | None = None


class PrefillRunner:
    """Computes prefixes, several at once if need be, and enters them into the prefix cache.

    Args:
        metrics: counts each prefill.
        traces: where it is noted what was done when.
        exchanges: chooses each prefix's exchange; without it, it is the configured one.
    """

    def __init__(
        self,
        executor: PrefillExecutor,
        prefixes: PrefixCache,
        admission: Admission,
        *,
        metrics: Metrics,
        traces: TraceStore,
        exchanges: ExchangeChooser | None = None,
    ) -> None:
        self._executor = executor
        self._prefixes = prefixes
        self._engine_id = uuid.uuid4().hex  # of this service run
        self._admission = admission
        self._metrics = metrics
        self._traces = traces
        self._exchanges = exchanges

    async def run(self, attempt: PrefillAttempt) -> tuple[PrefillResult, AttentionDetail | None]:
        """Compute a prefix. Cancelling this coroutine stops the ranks and frees the pages.

        Returns:
            The result and all that is kept of the attention report, which a baseline has not.

        Raises:
            ServiceError: KV_POOL_FULL, or why the ranks failed.
        """
        job_id = attempt.job_id
        with self._traces.span(job_id, "make room"):
            task, kv_bytes = await self._reserve(attempt)
        self._prefixes.add_prefix(task.manifest, kv_bytes, attempt.base_id)
        attempt.on_start()
        attention = None
        report = None
        try:
            with self._traces.span(job_id, "ranks"):
                outcome = await self._executor.prefill(
                    task, attempt.on_progress, attempt.placement.preempts
                )
            self._traces.add_rank_spans(job_id, outcome.spans)
            if task.baseline is None and task.base is None:
                attention = summarize(attempt.spec.attention, outcome.attention)
                report = detail(attention, outcome.attention, task.plan)
                if self._exchanges is not None:
                    self._exchanges.learn(task, outcome)
            lease_id = self._prefixes.complete_prefix(task.plan.prefix_id)
        except BaseException:
            self._prefixes.invalidate(task.manifest)
            raise
        self._record(task, outcome, attention)
        base = self._prefixes.standing_pages(attempt.base_id) if attempt.base_id else None
        handoff = HandoffParams(task.manifest, lease_id, report_to="", base=base)
        return _result(task, outcome, attention, kv_bytes=kv_bytes, handoff=handoff), report

    async def _reserve(self, attempt: PrefillAttempt) -> tuple[PrefillTask, int]:
        """Make the task and room for its pages, whose bytes are returned with it.

        Nothing is awaited after the workers were seen alive, so that the manifest names the
        epoch that the task is sent to.
        """
        plan = attempt.plan
        way = await self._choose_way(attempt)
        layout = self._executor.kv_layout
        while True:
            await self._executor.supervisor.wait_ready()
            whole_units = way.base is None and self._executor.has_whole_units(
                plan, way.exchange, way.policy
            )
            runs = self._shard_map(attempt, way, whole_units)
            pages = sum(layout.pages_for(run.end_token - run.start_token) for run in runs)
            kv_bytes = pages * layout.page_bytes
            await self._prefixes.make_room(
                kv_bytes, prefix_id=plan.prefix_id, base_id=attempt.base_id
            )
            if self._executor.supervisor.ready:
                break
        manifest = Manifest(
            prefix_id=plan.prefix_id,
            engine_id=self._engine_id,
            epoch=self._executor.supervisor.epoch,
            model_fingerprint=self._admission.fingerprint,
            layout=layout,
            num_tokens=plan.num_tokens,
            runs=runs,
            endpoints=self._executor.supervisor.endpoints,
            token_ids_hash=hash_token_ids(plan.token_ids),
            position_delta=plan.position_delta,
            attention_key=self._admission.attention_key(attempt.spec),
            start_token=0 if way.base is None else way.base.num_tokens,
        )
        task = PrefillTask(
            job_id=attempt.job_id,
            plan=plan,
            manifest=manifest,
            video_path=str(attempt.video.path),
            index_path=str(attempt.video.index_path),
            subgroup=attempt.placement.subgroup,
            policy=way.policy,
            exchange=way.exchange,
            whole_units=whole_units,
            baseline=way.baseline,
            base=way.base,
        )
        return task, kv_bytes

    async def _choose_way(self, attempt: PrefillAttempt) -> _Way:
        """How the ranks compute a prefix.

        Raises:
            ServiceError: UNKNOWN_PREFIX, if the prefix that it extends has gone.
        """
        subgroup = attempt.placement.subgroup
        if attempt.base_id:
            base = self._prefixes.standing_pages(attempt.base_id).manifest
            return _Way(resolve_policy(Quality.EXACT), ExchangeChoice(PASS_Q), base=base)
        policy = self._admission.with_head_budgets(attempt.spec.attention)
        baseline = await self._admission.baseline_task(attempt.spec, attempt.plan)
        exchange = self._executor.exchange_of(subgroup)
        if self._exchanges is not None and baseline is None:
            await self._executor.supervisor.wait_ready()  # the choice needs the ranks' probe
            exchange = await asyncio.to_thread(
                self._exchanges.choose, attempt.plan, policy, ranks=subgroup.size
            )
        return _Way(policy, exchange, baseline=baseline)

    def _shard_map(
        self, attempt: PrefillAttempt, way: _Way, whole_units: bool
    ) -> tuple[ShardRun, ...]:
        plan = attempt.plan
        subgroup = attempt.placement.subgroup
        if way.base is not None:
            return self._executor.text_shard_map(way.base, plan, subgroup)
        if way.baseline is not None:
            return self._executor.baseline_shard_map(plan, way.baseline, subgroup)
        return self._executor.shard_map(plan, way.exchange, subgroup, whole_units=whole_units)

    def _record(
        self, task: PrefillTask, outcome: PrefillOutcome, attention: AttentionSummary | None
    ) -> None:
        """Count a finished prefill and log it."""
        tokens = task.plan.num_tokens - task.manifest.start_token
        self._metrics.record_prefill(
            tokens,
            outcome,
            attention,
            method=task.baseline.method.name if task.baseline else "",
            ranks=task.subgroup.size,
        )
        stages = {str(stage): round(value, 2) for stage, value in outcome.stage_seconds.items()}
        logger.info(
            "%s: %d tokens in %.2f s on %s (paused for %.2f s), slowest rank's stages %s, "
            "%d bytes received from other ranks, attention %s%s",
            task.job_id,
            tokens,
            outcome.seconds,
            task.subgroup,
            outcome.paused_s,
            stages,
            outcome.bytes_received,
            task.manifest.attention_key,
            _figures(attention),
        )
        if outcome.unlisted_frames:
            logger.warning(
                "%s: %d of %d frames have sizes that the video's index does not list",
                task.job_id,
                outcome.unlisted_frames,
                len(task.plan.frame_indices),
            )


def _figures(attention: AttentionSummary | None) -> str:
    if attention is None:
        return ""
    total = attention.total
    return f", density {total.density:.3f}, kept mass {total.kept_mass_mean:.4f}"


def _result(
    task: PrefillTask,
    outcome: PrefillOutcome,
    attention: AttentionSummary | None,
    *,
    kv_bytes: int,
    handoff: HandoffParams,
) -> PrefillResult:
    plan = task.plan
    manifest = task.manifest
    params = handoff.to_kv_transfer_params()
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
        exchange=task.baseline.method.name if task.baseline else str(task.exchange),
        communication=outcome.communication,
        unlisted_frames=outcome.unlisted_frames,
        warnings=(
            *plan.warnings,
            *_size_warnings(outcome.unlisted_frames, len(plan.frame_indices)),
        ),
    )


def _size_warnings(unlisted: int, frames: int) -> tuple[VideoWarning, ...]:
    """Says that frames of the prefix have sizes that the video's index does not list."""
    if not unlisted:
        return ()
    message = (
        f"{unlisted} of the {frames} frames looked at have another size than those that the index "
        "found: they are fitted into the video's, with black bars where their shape is another"
    )
    return (VideoWarning(WarningReason.SIZE_CHANGES, message),)
