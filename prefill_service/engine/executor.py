"""The front end's handle on all workers: subgroups of their ranks compute prefixes side by side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.config import EngineConfig, VideoConfig, resolve_threads
from prefill_service.engine import messages as msg
from prefill_service.engine.preemption import Allocation, RankAllocator
from prefill_service.engine.processes.fork_server import ForkServer
from prefill_service.engine.resolve import (
    chunk_tokens,
    exchange_choice,
    is_sparse,
    kv_budget,
    kv_layout,
)
from prefill_service.engine.shard_map import (
    baseline_runs,
    baseline_split,
    shard_runs,
    text_layout,
    token_layout,
)
from prefill_service.engine.supervisor import WorkerSupervisor
from prefill_service.engine.task_state import PrefillOutcome, TaskState
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import Manifest, ShardRun
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup, form_subgroups

logger = logging.getLogger(__name__)

_CANCEL_GRACE_S = 30.0


class PrefillExecutor:
    """R workers. Each subgroup of their ranks computes one task at a time, or a second in a pause.

    Args:
        engine, video: configuration.
        checkpoint, dtype, device: of the model.
        runtime_dir: for sockets and rendezvous; short, since Unix socket paths are.
        fork_server: forks the workers; several executors may share one.

    Attributes:
        supervisor: starts, watches and restarts the workers.
        kv_layout: of a KV page.
        chunk_tokens: tokens per chunk and rank.
        subgroups: those that may compute a prefix, the largest first.
        all_ranks: the subgroup of all ranks.

    Raises:
        ServiceError: CONFIG_INVALID, an exchange that this model's heads do not allow.
    """

    def __init__(
        self,
        engine: EngineConfig,
        video: VideoConfig,
        checkpoint: Checkpoint,
        dtype: str,
        *,
        device: str,
        runtime_dir: Path,
        fork_server: ForkServer | None = None,
    ) -> None:
        self.kv_layout = kv_layout(checkpoint, dtype, engine)
        self.chunk_tokens = chunk_tokens(engine, device)
        self.subgroups = form_subgroups(engine.ranks, engine.elastic)
        self.all_ranks = self.subgroups[0]
        self._exchanges = {
            subgroup.size: exchange_choice(checkpoint, engine, subgroup.size)
            for subgroup in self.subgroups
        }
        self._tasks: dict[str, TaskState] = {}
        self._allocator = RankAllocator(
            lambda allocation: self._send(msg.PauseTask(allocation.job_id), allocation.subgroup),
            lambda allocation: self._send(msg.ResumeTask(allocation.job_id), allocation.subgroup),
            lambda *pair: self.fit_together(*((one.tokens, one.subgroup) for one in pair)),
        )
        self._budget: Callable[[int], KVBudget] = cache(
            lambda ranks: kv_budget(engine, checkpoint, dtype, device=device, ranks=ranks)
        )

        def make_spec(rank: int, epoch: int, folder: Path) -> msg.WorkerSpec:
            return msg.WorkerSpec(
                rank=rank,
                epoch=epoch,
                engine=replace(engine, sparse_from_tokens=self.supervisor.crossover),
                video=video,
                checkpoint=checkpoint,
                dtype=dtype,
                device=device,
                threads=resolve_threads(engine),
                init_method=f"file://{folder.absolute()}/rendezvous",
                runtime_dir=str(folder),
            )

        self.supervisor = WorkerSupervisor(
            engine,
            make_spec,
            runtime_dir,
            on_message=self._on_message,
            jobs_of=self._jobs_of,
            fork_server=fork_server,
        )
        self.supervisor.add_loss_listener(self._fail_tasks)

    # ---- before a task ---------------------------------------------------------------------

    def exchange_of(self, subgroup: Subgroup) -> ExchangeChoice:
        """The configured exchange, on the mesh that it has in this subgroup."""
        return self._exchanges[subgroup.size]

    def has_whole_units(
        self, plan: PrefixPlan, exchange: ExchangeChoice, policy: AttentionPolicy
    ) -> bool:
        """Whether ranks get whole selection units of a prefix, because its attention is sparse.

        The workers must be ready: they measure from which length on it is.
        """
        return is_sparse(plan.num_tokens, exchange, policy, self.supervisor.sparse_from_tokens)

    def shard_map(
        self,
        plan: PrefixPlan,
        exchange: ExchangeChoice,
        subgroup: Subgroup,
        *,
        whole_units: bool = False,
    ) -> tuple[ShardRun, ...]:
        """Which rank will hold which tokens of ``plan``."""
        layout = token_layout(
            plan,
            subgroup.size,
            self.chunk_tokens,
            exchange=exchange,
            whole_units=whole_units,
        )
        return shard_runs(layout, self.kv_layout, subgroup)

    def text_shard_map(
        self, base: Manifest, plan: PrefixPlan, subgroup: Subgroup
    ) -> tuple[ShardRun, ...]:
        """Which rank will hold which tokens of the text that ``plan`` has after a prefix."""
        layout = text_layout(base, plan, subgroup.size, self.chunk_tokens)
        return shard_runs(layout, self.kv_layout, subgroup)

    def baseline_shard_map(
        self, plan: PrefixPlan, baseline: msg.BaselineTask, subgroup: Subgroup
    ) -> tuple[ShardRun, ...]:
        """Which rank will hold which tokens of ``plan``, computed by a published method."""
        split = baseline_split(plan, baseline, subgroup.size)
        return baseline_runs(split, self.kv_layout, subgroup)

    def fits(self, tokens: int, subgroup: Subgroup) -> bool:
        """Whether the subgroup's ranks can have the KV buffers of a prefix."""
        return tokens <= self._budget(subgroup.size).fitting_tokens

    def fit_together(
        self, preempted: tuple[int, Subgroup], preempting: tuple[int, Subgroup]
    ) -> bool:
        """Whether ranks can have those of two tasks (tokens, subgroup) at once, none offloaded."""
        needed = [
            self._budget(subgroup.size).working_set(tokens)
            for tokens, subgroup in (preempted, preempting)
        ]
        return sum(needed) <= self._budget(self.all_ranks.size).working_bytes

    # ---- work ------------------------------------------------------------------------------

    async def prefill(
        self,
        task: msg.PrefillTask,
        on_progress: Callable[[msg.Progress], None],
        preempts: str = "",
    ) -> PrefillOutcome:
        """Compute a task; waits for its ranks. Cancelling the caller stops the ranks' work.

        Args:
            preempts: id of a job that is to be paused at its next chunk for this one, if it runs
                on all of its ranks, has a next chunk, and both fit together.

        Raises:
            ServiceError: the task's own error; RANK_DIED or RANK_STALLED when the workers went
                down with it; STALE_GENERATION if the manifest names an earlier epoch.
        """
        acquired = self._allocator.acquire(
            task.job_id,
            task.subgroup,
            tokens=task.plan.num_tokens,
            preempts=preempts,
            preemptible=task.baseline is None,  # a baseline has no chunks
        )
        async with acquired as allocation:
            await self.supervisor.wait_ready()
            self._check_epoch(task.manifest.epoch)
            start = time.perf_counter()
            future = asyncio.get_running_loop().create_future()
            state = TaskState(task.job_id, task.subgroup, on_progress, future)
            self._tasks[task.job_id] = state
            try:
                self._send(msg.StartTask(task), task.subgroup)
                self._allocator.mark_started(allocation)
                await self._await_or_cancel(state, allocation)
            finally:
                del self._tasks[task.job_id]
            return state.outcome(time.perf_counter() - start, allocation.paused_s)

    def _check_epoch(self, epoch: int) -> None:
        current = self.supervisor.epoch
        if epoch != current:
            raise ServiceError(
                Reason.STALE_GENERATION,
                f"the manifest names epoch {epoch}, the ranks are at {current}",
                generation=current,
            )

    async def _await_or_cancel(self, state: TaskState, allocation: Allocation) -> None:
        try:
            await asyncio.shield(state.future)
        except asyncio.CancelledError:
            self._send(msg.CancelTask(state.job_id), state.subgroup)
            self._allocator.mark_stopping(allocation)
            # A paused task stops when the one that preempts it, whose ranks are watched, has ended.
            paused = allocation.paused
            while not await state.settled(_CANCEL_GRACE_S):
                if not paused:
                    self.supervisor.declare_lost(state.not_stopped(_CANCEL_GRACE_S))
                    break
                paused = allocation.paused
            if state.future.done():  # it is not where all workers are being stopped anyway
                with contextlib.suppress(ServiceError):
                    state.future.result()
            raise

    def grant_lease(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        """Create or renew a lease on every rank."""
        self.supervisor.send(msg.GrantLease(prefix_id, lease_id, ttl_s))

    def release_lease(self, prefix_id: str, lease_id: str) -> None:
        """End a lease on every rank."""
        self.supervisor.send(msg.ReleaseLease(prefix_id, lease_id))

    def drop_prefix(self, prefix_id: str) -> None:
        """Free a prefix's pages on every rank."""
        self.supervisor.send(msg.DropPrefix(prefix_id))

    # ---- events ----------------------------------------------------------------------------

    def _send(self, message: object, subgroup: Subgroup) -> None:
        if isinstance(message, msg.PauseTask | msg.ResumeTask):
            logger.info("%s: %s", message.job_id, type(message).__name__)
        self.supervisor.send(message, subgroup.members)

    def _on_message(self, message: object) -> None:
        match message:
            case msg.Progress(job_id=job_id) if state := self._tasks.get(job_id):
                state.on_progress(message)
            case msg.TaskPaused(job_id, rank):
                self._allocator.confirm_paused(job_id, rank)
            case msg.RankDone(job_id=job_id, rank=rank) if state := self._tasks.get(job_id):
                state.done[rank] = message
                state.settle()
            case msg.RankFailed(job_id, rank, error) if state := self._tasks.get(job_id):
                state.failed[rank] = ServiceError.from_dict(error)
                state.settle()

    def _fail_tasks(self, epoch: int, error: ServiceError) -> None:
        for state in self._tasks.values():
            if not state.future.done():
                state.future.set_exception(error)

    def _jobs_of(self, rank: int) -> list[str]:
        return [job for job, state in self._tasks.items() if rank in state.subgroup.members]
