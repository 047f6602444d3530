"""The front end's view of the rank group: start, feed, watch, restart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from prefill_service.config import EngineConfig, VideoConfig, resolve_threads
from prefill_service.engine import messages as msg
from prefill_service.engine.process import RankProcess
from prefill_service.engine.running import PrefillOutcome, RunningTask
from prefill_service.engine.shards import comparison_runs, comparison_split, shard_runs
from prefill_service.engine.spec import RankSpec, chunk_layout, exchange_choice, kv_layout
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.manifest import ShardRun
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.plan import PrefixPlan
from prefill_service.parallel.exchanges import ExchangeChoice
from prefill_service.planning.fitting import Observation

logger = logging.getLogger("prefill_service.group")

_CANCEL_GRACE_S = 30.0
_STOP_GRACE_S = 5.0
_CRASH_DELAY_S = 0.5
_MAX_START_FAILURES = 3


class RankGroup:
    """R rank processes that compute one task at a time.

    A rank's death or silence kills the whole group: collectives cannot go on with a member
    missing. The group then starts afresh with the next generation; everything it held is lost.

    Args:
        engine, video: configuration.
        checkpoint, dtype, device: of the model.
        runtime_dir: for sockets and rendezvous; short, since Unix socket paths are.

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
        self._video = video
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._runtime_dir = runtime_dir
        self.generation = 0
        self.layout = kv_layout(checkpoint, dtype, engine)
        self.exchange = exchange_choice(checkpoint, engine)
        self.endpoints: tuple[str, ...] = ()
        self.on_lost: Callable[[int], None] | None = None
        self._ranks: list[RankProcess] = []
        self._ready: dict[int, msg.Ready] = {}
        self._crashed: set[int] = set()
        self._start_failures = 0
        self._spawned: float | None = None
        self._all_ready = asyncio.Event()
        self._failure: ServiceError | None = None
        self._task: RunningTask | None = None
        self._turn = asyncio.Lock()
        self._watcher: asyncio.Task[None] | None = None
        self._restarter: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def observed(self) -> tuple[Observation, ...]:
        """Of a group that is ready: what rank 0 measured at start, if exchanges are planned."""
        return self._ready[0].observed if 0 in self._ready else ()

    # ---- life ------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True while all ranks are up."""
        return self._all_ready.is_set() and self._failure is None

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids by rank."""
        return tuple(rank.pid for rank in self._ranks)

    async def start(self) -> None:
        """Spawn the ranks and wait until all are ready.

        Raises:
            ServiceError: what a rank failed with, or RANK_STALLED after ``start_timeout_s``.
        """
        self._watcher = asyncio.create_task(self._watch(), name="rank-watcher")
        try:
            self._spawn()
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ask the ranks to leave, kill those that do not. Idempotent."""
        self._stopping = True
        for background in (self._watcher, self._restarter):
            if background is not None:
                background.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await background
        for rank in self._ranks:
            rank.send(msg.Shutdown())
        deadline = time.monotonic() + _STOP_GRACE_S
        for rank in self._ranks:
            await rank.wait(deadline - time.monotonic())
        self._kill_all()
        self._all_ready.clear()

    async def wait_ready(self) -> None:
        """Wait through a (re)start.

        Raises:
            ServiceError: the group cannot start, or takes longer than ``start_timeout_s``.
        """
        waiter = asyncio.ensure_future(self._all_ready.wait())
        try:
            async with asyncio.timeout(self._engine.start_timeout_s):
                await waiter
        except TimeoutError:
            missing = sorted(set(range(self._engine.ranks)) - set(self._ready))
            raise ServiceError(
                Reason.RANK_STALLED,
                f"ranks {missing} were not ready after {self._engine.start_timeout_s:g} s",
                ranks=missing,
            ) from None
        if self._failure is not None:
            raise self._failure

    def _spawn(self) -> None:
        self._runtime_dir.mkdir(parents=True, exist_ok=True)
        self._ready.clear()
        self._crashed.clear()
        self._all_ready.clear()
        self._spawned = time.monotonic()
        rendezvous = self._runtime_dir / f"rendezvous-{uuid.uuid4().hex[:12]}"
        generation = self.generation
        self._ranks = []
        for rank in range(self._engine.ranks):
            spec = RankSpec(
                rank=rank,
                generation=generation,
                engine=self._engine,
                video=self._video,
                checkpoint=self._checkpoint,
                dtype=self._dtype,
                device=self._device,
                threads=resolve_threads(self._engine),
                init_method=f"file://{rendezvous.absolute()}",
                socket_path=str(self._runtime_dir / f"g{generation}r{rank}.sock"),
            )
            try:
                process = RankProcess(
                    spec,
                    on_message=partial(self._on_message, generation),
                    on_exit=partial(self._on_exit, generation),
                )
            except OSError as error:  # out of processes, descriptors or memory
                raise ServiceError(
                    Reason.RANK_DIED, f"rank {rank} cannot be started: {error}", rank=rank
                ) from error
            self._ranks.append(process)  # one by one: those before a failure must be killed

    # ---- work ------------------------------------------------------------------------------

    def shard_map(
        self,
        plan: PrefixPlan,
        exchange: ExchangeChoice | None = None,
        comparison: msg.ComparisonTask | None = None,
    ) -> tuple[ShardRun, ...]:
        """Which rank will hold which tokens of ``plan``, with the group's or another exchange."""
        if comparison is not None:
            split = comparison_split(plan, comparison, self._engine.ranks)
            return comparison_runs(split, self.layout)
        choice = exchange or self.exchange
        layout = chunk_layout(plan.patch_ends, self._engine, self._device, choice)
        return shard_runs(layout, self.layout)

    async def prefill(
        self, task: msg.PrefillTask, on_progress: Callable[[msg.Progress], None]
    ) -> PrefillOutcome:
        """Compute a task; waits for its turn. Cancelling the caller stops the ranks' work.

        Raises:
            ServiceError: the task's own error; RANK_DIED or RANK_STALLED when the group went
                down with it; STALE_GENERATION if the manifest names an earlier group.
        """
        async with self._turn:
            await self.wait_ready()
            if task.manifest.generation != self.generation:
                raise ServiceError(
                    Reason.STALE_GENERATION,
                    f"the manifest names generation {task.manifest.generation}, "
                    f"the ranks are at {self.generation}",
                    generation=self.generation,
                )
            start = time.perf_counter()
            loop = asyncio.get_running_loop()
            running = RunningTask(task.job_id, on_progress, loop.create_future())
            self._task = running
            try:
                for rank in self._ranks:
                    rank.send(msg.Run(task))
                await self._await_or_cancel(running)
            finally:
                self._task = None
            return running.outcome(time.perf_counter() - start)

    async def _await_or_cancel(self, running: RunningTask) -> None:
        try:
            await asyncio.shield(running.future)
        except asyncio.CancelledError:
            for rank in self._ranks:
                rank.send(msg.Cancel(running.job_id))
            settled, _ = await asyncio.wait([running.future], timeout=_CANCEL_GRACE_S)
            if not settled:
                self._lose(
                    ServiceError(
                        Reason.RANK_STALLED,
                        f"the ranks did not stop job {running.job_id} within {_CANCEL_GRACE_S:g} s",
                        job_id=running.job_id,
                    )
                )
            if running.future.done():  # not where the group is being stopped anyway
                with contextlib.suppress(ServiceError):
                    running.future.result()
            raise

    def grant(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        """Create or renew a lease on every rank."""
        self._send_all(msg.Grant(prefix_id, lease_id, ttl_s))

    def release(self, prefix_id: str, lease_id: str) -> None:
        """End a lease on every rank."""
        self._send_all(msg.Release(prefix_id, lease_id))

    def drop(self, prefix_id: str) -> None:
        """Free a prefix's pages on every rank."""
        self._send_all(msg.Drop(prefix_id))

    def _send_all(self, message: object) -> None:
        for rank in self._ranks:
            rank.send(message)

    # ---- events ----------------------------------------------------------------------------

    def _on_message(self, generation: int, message: object) -> None:
        if generation != self.generation:
            return
        running = self._task
        match message:
            case msg.Ready(rank=rank):
                self._ready[rank] = message
                if len(self._ready) == self._engine.ranks:
                    self._become_ready()
            case msg.Progress(job_id=job_id) if running and running.job_id == job_id:
                running.on_progress(message)
            case msg.RankDone(job_id=job_id, rank=rank) if running and running.job_id == job_id:
                running.done[rank] = message
                running.settle(self._engine.ranks)
            case msg.RankFailed(job_id, rank, error) if running and running.job_id == job_id:
                running.failed[rank] = ServiceError.from_dict(error)
                running.settle(self._engine.ranks)
            case msg.RankCrashed(rank, error):
                self._crashed.add(rank)
                # A rank also fails when a peer was killed under it: give the exit that
                # explains the failure a moment to arrive first.
                asyncio.get_running_loop().call_later(
                    _CRASH_DELAY_S, self._lose_crashed, generation, ServiceError.from_dict(error)
                )

    def _become_ready(self) -> None:
        self._failure = None
        self.endpoints = tuple(self._ready[r].endpoint for r in range(self._engine.ranks))
        self._all_ready.set()
        logger.info(
            "group of %d ranks is ready: generation %d, %s, %s, %d threads per rank",
            self._engine.ranks, self.generation, self._ready[0].device, self._dtype,
            resolve_threads(self._engine),
        )  # fmt: skip

    def _on_exit(self, generation: int, rank: int, cause: str) -> None:
        if generation == self.generation and not self._stopping and rank not in self._crashed:
            job = self._task.job_id if self._task else ""
            during = f" during job {job}" if job else ""
            self._lose(
                ServiceError(
                    Reason.RANK_DIED, f"rank {rank} {cause}{during}", rank=rank, cause=cause
                )
            )

    def _lose_crashed(self, generation: int, error: ServiceError) -> None:
        if generation == self.generation:
            self._lose(error)

    async def _watch(self) -> None:
        """Kill a group with a silent rank, or with a busy rank that gets nowhere."""
        while True:
            await asyncio.sleep(0.5)
            if not self.ready:
                self._watch_start()
                continue
            for rank in self._ranks:
                if rank.silent_s > self._engine.heartbeat_timeout_s:
                    what, limit = "sent no heartbeat", self._engine.heartbeat_timeout_s
                elif rank.stalled_s > self._engine.stall_timeout_s:
                    what, limit = "made no progress", self._engine.stall_timeout_s
                else:
                    continue
                message = f"rank {rank.rank} {what} for {limit:g} s"
                self._lose(ServiceError(Reason.RANK_STALLED, message, rank=rank.rank))
                break

    def _watch_start(self) -> None:
        """A start that hangs is a lost group, too."""
        limit = self._engine.start_timeout_s
        if self._spawned is None or time.monotonic() - self._spawned < limit:
            return
        missing = sorted(set(range(self._engine.ranks)) - set(self._ready))
        self._lose(
            ServiceError(
                Reason.RANK_STALLED, f"ranks {missing} were not ready after {limit:g} s",
                ranks=missing,
            )
        )  # fmt: skip

    def _lose(self, error: ServiceError) -> None:
        """The group is lost: kill what is left, tell those who wait, start the next one."""
        if self._stopping:
            return
        lost, was_ready = self.generation, self._all_ready.is_set()
        self.generation += 1
        logger.error("generation %d of the group is lost: %s", lost, error)
        self._all_ready.clear()
        self._spawned = None
        self._kill_all()
        running = self._task
        if running and not running.future.done():
            running.future.set_exception(error)
        if self.on_lost is not None:
            self.on_lost(lost)
        self._start_failures = 0 if was_ready else self._start_failures + 1
        if self._start_failures >= _MAX_START_FAILURES or error.reason is Reason.MODEL_INVALID:
            self._failure = error
            self._all_ready.set()  # wakes wait_ready, which raises the failure
            return
        self._restarter = asyncio.create_task(self._restart(), name="rank-restarter")

    async def _restart(self) -> None:
        await asyncio.sleep(min(2.0**self._start_failures - 1, 10.0))
        logger.info("starting generation %d of the group", self.generation)
        try:
            self._spawn()
        except ServiceError as error:
            self._lose(error)

    def _kill_all(self) -> None:
        for rank in self._ranks:
            rank.kill()
