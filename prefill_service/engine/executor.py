"""The front end's view of the rank group: teams of its ranks compute prefixes side by side."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.config import EngineConfig, VideoConfig, resolve_threads
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine import messages as msg
from prefill_service.engine.preemption import Allocation, RankAllocator
from prefill_service.engine.resolve import (
    WorkerSpec,
    chunk_layout,
    chunk_tokens,
    exchange_choice,
    is_sparse,
    kv_budget,
    kv_layout,
)
from prefill_service.engine.shard_map import baseline_runs, baseline_split, shard_runs
from prefill_service.engine.supervisor import WorkerSupervisor
from prefill_service.engine.task_state import PrefillOutcome, TaskState
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import ShardRun
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup, form_subgroups

logger = logging.getLogger("prefill_service.group")

_CANCEL_GRACE_S = 30.0


class PrefillExecutor:
    """R rank processes, whose teams compute one task each at a time, and a second in its pause.

    Args:
        engine, video: configuration.
        checkpoint, dtype, device: of the model.
        runtime_dir: for sockets and rendezvous; short, since Unix socket paths are.

    Attributes:
        layout: of a KV page.
        chunk_tokens: tokens per chunk and rank.
        teams, everyone: that may compute a prefix, and the one of all ranks.
        on_lost: called with the generation that was lost with a rank; a new one then starts.

    Raises:
        ServiceError: CONFIG_INVALID, an exchange that this model's heads do not allow.
    """

    def __init__(
        self,
        engine: EngineConfig,
        video: VideoConfig,
        checkpoint: Checkpoint,
        dtype: str,
        device: str,
        runtime_dir: Path,
    ) -> None:
        self._engine = engine
        self._device = device
        self._checkpoint = checkpoint
        self.layout = kv_layout(checkpoint, dtype, engine)
        self.chunk_tokens = chunk_tokens(engine, device)
        self.teams = form_subgroups(engine.ranks, engine.elastic)
        self.everyone = self.teams[0]
        self._exchanges = {
            team.size: exchange_choice(checkpoint, engine, team.size) for team in self.teams
        }
        self.on_lost: Callable[[int], None] | None = None
        self._tasks: dict[str, TaskState] = {}
        self._turns = RankAllocator(
            self._tell(msg.Pause),
            self._tell(msg.Resume),
            lambda *both: self.fit_together(*((turn.tokens, turn.team) for turn in both)),
        )
        self._budget: Callable[[int], KVBudget] = cache(
            lambda ranks: kv_budget(engine, checkpoint, dtype, device, ranks=ranks)
        )

        def spec(rank: int, generation: int, rendezvous: str) -> WorkerSpec:
            return WorkerSpec(
                rank=rank,
                generation=generation,
                engine=engine,
                video=video,
                checkpoint=checkpoint,
                dtype=dtype,
                device=device,
                threads=resolve_threads(engine),
                init_method=rendezvous,
                runtime_dir=str(runtime_dir),
            )

        self._ranks = WorkerSupervisor(
            engine, spec, runtime_dir, self._on_message, self._on_loss, self._jobs_of
        )

    # ---- life ------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """How often the ranks have been lost."""
        return self._ranks.generation

    @property
    def ready(self) -> bool:
        """True while all ranks are up."""
        return self._ranks.ready

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank."""
        return self._ranks.pids

    @property
    def endpoints(self) -> tuple[str, ...]:
        """By rank, where its pages are served; of ranks that are up."""
        return self._ranks.endpoints

    @property
    def observed(self) -> tuple[Observation, ...]:
        """Of a group that is ready: what rank 0 measured at start, if exchanges are planned."""
        return self._ranks.observed

    async def start(self) -> None:
        """Spawn the ranks and wait until all are ready.

        Raises:
            ServiceError: what a rank failed with, or RANK_STALLED after ``start_timeout_s``.
        """
        await self._ranks.start()

    async def stop(self) -> None:
        """Ask the ranks to leave, kill those that do not. Idempotent."""
        await self._ranks.stop()

    async def wait_ready(self) -> None:
        """Wait through a (re)start.

        Raises:
            ServiceError: the group cannot start, or takes longer than ``start_timeout_s``.
        """
        await self._ranks.wait_ready()

    # ---- before a task ---------------------------------------------------------------------

    @property
    def exchange(self) -> ExchangeChoice:
        """The configured one, of all ranks."""
        return self.exchange_of(self.everyone)

    def exchange_of(self, team: Subgroup) -> ExchangeChoice:
        """The configured one, on the mesh that it has in this team."""
        return self._exchanges[team.size]

    def shard_map(
        self,
        plan: PrefixPlan,
        exchange: ExchangeChoice | None = None,
        comparison: msg.BaselineTask | None = None,
        team: Subgroup | None = None,
        policy: AttentionPolicy | None = None,
    ) -> tuple[ShardRun, ...]:
        """Which rank will hold which tokens of ``plan``; of a group that is ready.

        Args:
            exchange: the configured one by default.
            team: all ranks by default.
            policy: exact by default.
        """
        team = team or self.everyone
        if comparison is not None:
            return baseline_runs(baseline_split(plan, comparison, team.size), self.layout, team)
        choice = exchange or self.exchange_of(team)
        sparse = policy is not None and is_sparse(
            plan.num_tokens, choice, policy, self._ranks.sparse_from_tokens
        )
        layout = chunk_layout(
            plan.patch_ends, self._engine, self._device, choice, team.size, sparse
        )
        return shard_runs(layout, self.layout, team)

    def fits(self, tokens: int, team: Subgroup) -> bool:
        """Whether the team's ranks can have the working KV of a prefix."""
        return tokens <= self._budget(team.size).fitting_tokens

    def fit_together(self, paused: tuple[int, Subgroup], inside: tuple[int, Subgroup]) -> bool:
        """Whether ranks can have that of two tasks (tokens, team) at once, nothing offloaded."""
        needed = [self._budget(team.size).working_set(tokens) for tokens, team in (paused, inside)]
        return sum(needed) <= self._budget(self.everyone.size).working_bytes

    # ---- work ------------------------------------------------------------------------------

    async def prefill(
        self, task: msg.PrefillTask, on_progress: Callable[[msg.Progress], None], over: str = ""
    ) -> PrefillOutcome:
        """Compute a task; waits for its ranks. Cancelling the caller stops the ranks' work.

        Args:
            over: id of a job that is to be paused at its next chunk for this one, if it is at work
                on all of its ranks, has a next chunk, and both fit together.

        Raises:
            ServiceError: the task's own error; RANK_DIED or RANK_STALLED when the group went
                down with it; STALE_GENERATION if the manifest names an earlier group.
        """
        tokens, pausable = task.plan.num_tokens, task.comparison is None  # which has no chunks
        async with self._turns.take(task.job_id, task.team, tokens, over, pausable) as turn:
            await self.wait_ready()
            if task.manifest.generation != self.generation:
                raise ServiceError(
                    Reason.STALE_GENERATION,
                    f"the manifest names generation {task.manifest.generation}, "
                    f"the ranks are at {self.generation}",
                    generation=self.generation,
                )
            start = time.perf_counter()
            future = asyncio.get_running_loop().create_future()
            running = TaskState(task.job_id, task.team, on_progress, future)
            self._tasks[task.job_id] = running
            try:
                self._ranks.send(msg.Run(task), task.team.members)
                self._turns.begun(turn)
                await self._await_or_cancel(running, turn)
            finally:
                del self._tasks[task.job_id]
            return running.outcome(time.perf_counter() - start, turn.paused_s)

    async def _await_or_cancel(self, running: TaskState, turn: Allocation) -> None:
        try:
            await asyncio.shield(running.future)
        except asyncio.CancelledError:
            self._ranks.send(msg.Cancel(running.job_id), running.team.members)
            self._turns.ending(turn)
            # A paused task stops when the one inside, whose ranks are watched, has ended.
            inside = turn.paused
            while not await running.settled(_CANCEL_GRACE_S):
                if not inside:
                    self._ranks.lose(running.not_stopped(_CANCEL_GRACE_S))
                    break
                inside = turn.paused
            if running.future.done():  # not where the group is being stopped anyway
                with contextlib.suppress(ServiceError):
                    running.future.result()
            raise

    def grant(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        """Create or renew a lease on every rank."""
        self._ranks.send(msg.Grant(prefix_id, lease_id, ttl_s))

    def release(self, prefix_id: str, lease_id: str) -> None:
        """End a lease on every rank."""
        self._ranks.send(msg.Release(prefix_id, lease_id))

    def drop(self, prefix_id: str) -> None:
        """Free a prefix's pages on every rank."""
        self._ranks.send(msg.Drop(prefix_id))

    # ---- events ----------------------------------------------------------------------------

    def _tell(self, message: type[msg.Pause] | type[msg.Resume]) -> Callable[[Allocation], None]:
        def tell(turn: Allocation) -> None:
            logger.info("%s: %s", turn.job_id, message.__name__.lower())
            self._ranks.send(message(turn.job_id), turn.team.members)

        return tell

    def _on_message(self, message: object) -> None:
        match message:
            case msg.Progress(job_id=job_id) if running := self._tasks.get(job_id):
                running.on_progress(message)
            case msg.Paused(job_id, rank):
                self._turns.said_paused(job_id, rank)
            case msg.RankDone(job_id=job_id, rank=rank) if running := self._tasks.get(job_id):
                running.done[rank] = message
                running.settle()
            case msg.RankFailed(job_id, rank, error) if running := self._tasks.get(job_id):
                running.failed[rank] = ServiceError.from_dict(error)
                running.settle()

    def _on_loss(self, generation: int, error: ServiceError) -> None:
        for running in self._tasks.values():
            if not running.future.done():
                running.future.set_exception(error)
        if self.on_lost is not None:
            self.on_lost(generation)

    def _jobs_of(self, rank: int) -> list[str]:
        return [job for job, running in self._tasks.items() if rank in running.team.members]
