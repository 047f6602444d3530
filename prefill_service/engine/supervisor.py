"""Starts the workers, watches them, and starts all of them anew when one of them is lost."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from prefill_service.attention.report import NEVER
from prefill_service.config import EngineConfig, resolve_threads
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine import messages as msg
from prefill_service.engine.processes.fork_server import ForkServer
from prefill_service.engine.processes.worker_process import WorkerProcess
from prefill_service.errors import Reason, ServiceError
from prefill_service.storage.disk_space import is_full

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0
_CRASH_DELAY_S = 0.5
_MAX_START_FAILURES = 3
_WATCH_S = 0.5

MakeSpec = Callable[[int, int, Path], msg.WorkerSpec]
"""Rank, epoch and the folder of that epoch to the spec of that worker."""

LossListener = Callable[[int, ServiceError], None]
"""Called with the epoch that was lost, and why."""


class WorkerSupervisor:
    """R workers of one epoch after the other.

    A worker's death or silence kills all of them: collectives cannot go on with a member missing.
    They then start afresh with the next epoch; everything they held is lost.

    Args:
        engine: how many workers, and how long they may take.
        make_spec: makes the spec of each worker.
        runtime_dir: where each epoch has a folder, for as long as its workers live.
        on_message: called with each message of the current epoch except ``WorkerReady``,
            heartbeats and crashes.
        jobs_of: ids of the jobs that run on a rank, for error messages.
        fork_server: forks the workers of CPUs; without one the supervisor has its own.

    Attributes:
        epoch: number of the workers' start: how often they have been lost.
        crossover: prompt length from which on attention is sparse, as configured or as the first
            epoch has measured it: a restart must not change what is computed. 0 before.
    """

    def __init__(
        self,
        engine: EngineConfig,
        make_spec: MakeSpec,
        runtime_dir: Path,
        *,
        on_message: Callable[[object], None],
        jobs_of: Callable[[int], list[str]],
        fork_server: ForkServer | None = None,
    ) -> None:
        self._engine = engine
        self._make_spec = make_spec
        self._runtime_dir = runtime_dir
        self._pass_on = on_message
        self._jobs_of = jobs_of
        self._fork_server = fork_server or ForkServer()
        self._owns_fork_server = fork_server is None
        self._loss_listeners: list[LossListener] = []
        self.epoch = 0
        self.crossover = engine.sparse_from_tokens
        self._workers: list[WorkerProcess] = []
        self._folder: Path | None = None
        self._ready: dict[int, msg.WorkerReady] = {}
        self._crashed: set[int] = set()
        self._start_failures = 0
        self._spawned: float | None = None
        self._all_ready = asyncio.Event()
        self._failure: ServiceError | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._restarter: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def ready(self) -> bool:
        """Whether all workers are up."""
        return self._all_ready.is_set() and self._failure is None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where each rank's pages are served, of the workers that are up."""
        return tuple(self._ready[rank].endpoint for rank in sorted(self._ready))

    @property
    def observed(self) -> tuple[Observation, ...]:
        """What rank 0 measured at start, if the exchange is ``auto``; nothing before it is up."""
        return self._ready[0].observed if 0 in self._ready else ()

    @property
    def sparse_from_tokens(self) -> int:
        """Prompts of at least this many tokens are sparse; ``NEVER`` before the workers are up."""
        return self._ready[0].sparse_from_tokens if 0 in self._ready else NEVER

    def send(self, message: object, ranks: Iterable[int] | None = None) -> None:
        """Send to some ranks, or to all. Each gets messages in the order of the calls."""
        for worker in self._workers:
            if ranks is None or worker.rank in ranks:
                worker.send(message)

    def add_loss_listener(self, listener: LossListener) -> None:
        """Call ``listener`` at once whenever an epoch is lost, before the next one starts."""
        self._loss_listeners.append(listener)

    # ---- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the workers and wait until all are ready.

        Raises:
            ServiceError: what a worker failed with, or RANK_STALLED after ``start_timeout_s``.
        """
        self._watcher = asyncio.create_task(self._watch(), name="worker-watcher")
        try:
            self._spawn()
            await self.wait_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ask the workers to exit, kill those that do not. Idempotent."""
        self._stopping = True
        for background in (self._watcher, self._restarter):
            if background is not None:
                background.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await background
        self.send(msg.Shutdown())
        deadline = time.monotonic() + _STOP_GRACE_S
        for worker in self._workers:
            await worker.wait(deadline - time.monotonic())
        self._kill_all()
        if self._owns_fork_server:
            self._fork_server.close()
        self._all_ready.clear()
        await self._remove_folder()

    async def wait_ready(self) -> None:
        """Wait through a (re)start.

        Raises:
            ServiceError: the workers cannot start, or take longer than ``start_timeout_s``.
        """
        waiter = asyncio.ensure_future(self._all_ready.wait())
        try:
            async with asyncio.timeout(self._engine.start_timeout_s):
                await waiter
        except TimeoutError:
            raise self._not_ready() from None
        if self._failure is not None:
            raise self._failure

    def _not_ready(self) -> ServiceError:
        missing = sorted(set(range(self._engine.ranks)) - set(self._ready))
        limit = self._engine.start_timeout_s
        text = f"ranks {missing} were not ready after {limit:g} s"
        return ServiceError(Reason.RANK_STALLED, text, ranks=missing)

    def _spawn(self) -> None:
        folder = self._folder = self._make_folder()
        self._ready.clear()
        self._crashed.clear()
        self._all_ready.clear()
        self._spawned = time.monotonic()
        epoch = self.epoch
        self._workers = []
        for rank in range(self._engine.ranks):
            worker = WorkerProcess(
                self._make_spec(rank, epoch, folder),
                self._fork_server,
                on_message=partial(self._on_message, epoch),
                on_exit=partial(self._on_exit, epoch),
            )
            try:
                worker.start()
            except OSError as error:  # out of processes, descriptors or memory
                raise ServiceError(
                    Reason.RANK_DIED, f"rank {rank} cannot be started: {error}", rank=rank
                ) from error
            self._workers.append(worker)  # one by one: those before a failure must be killed

    def _make_folder(self) -> Path:
        try:
            self._runtime_dir.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=f"e{self.epoch}-", dir=self._runtime_dir))
        except OSError as error:
            reason = Reason.STORAGE_FULL if is_full(error) else Reason.RANK_DIED
            text = f"the ranks cannot be started: {self._runtime_dir}: {error.strerror}"
            raise ServiceError(reason, text, path=self._runtime_dir) from error

    # ---- events ----------------------------------------------------------------------------

    def _on_message(self, epoch: int, message: object) -> None:
        if epoch != self.epoch:
            return
        match message:
            case msg.WorkerReady(rank=rank):
                self._ready[rank] = message
                if len(self._ready) == self._engine.ranks:
                    self._become_ready(message)
            case msg.WorkerCrashed(rank, error):
                self._crashed.add(rank)
                # A rank also fails when a peer was killed under it: give the exit that
                # explains the failure a moment to arrive first.
                asyncio.get_running_loop().call_later(
                    _CRASH_DELAY_S, self._lose_crashed, epoch, ServiceError.from_dict(error)
                )
            case _:
                self._pass_on(message)

    def _become_ready(self, last: msg.WorkerReady) -> None:
        self.crossover = last.sparse_from_tokens
        self._failure = None
        self._all_ready.set()
        logger.info(
            "%d ranks are ready: epoch %d, %s, %d threads per rank",
            self._engine.ranks,
            self.epoch,
            last.device,
            resolve_threads(self._engine),
        )

    def _on_exit(self, epoch: int, rank: int, cause: str) -> None:
        if epoch == self.epoch and not self._stopping and rank not in self._crashed:
            jobs = ", ".join(self._jobs_of(rank))
            during = f" during job {jobs}" if jobs else ""
            text = f"rank {rank} {cause}{during}"
            self.declare_lost(ServiceError(Reason.RANK_DIED, text, rank=rank, cause=cause))

    def _lose_crashed(self, epoch: int, error: ServiceError) -> None:
        if epoch == self.epoch:
            self.declare_lost(error)

    async def _watch(self) -> None:
        """Declare the workers lost when one is silent, or busy without making progress."""
        while True:
            begin = time.monotonic()
            await asyncio.sleep(_WATCH_S)
            # While this process stood still, heartbeats came that it has not read yet.
            late_s = time.monotonic() - begin - _WATCH_S
            if not self.ready:
                self._watch_start()
                continue
            for worker in self._workers:
                if worker.silent_s - late_s > self._engine.heartbeat_timeout_s:
                    what = "sent no heartbeat"
                    limit = self._engine.heartbeat_timeout_s
                elif worker.stalled_s - late_s > self._engine.stall_timeout_s:
                    what = "made no progress"
                    limit = self._engine.stall_timeout_s
                else:
                    continue
                message = f"rank {worker.rank} {what} for {limit:g} s"
                self.declare_lost(ServiceError(Reason.RANK_STALLED, message, rank=worker.rank))
                break

    def _watch_start(self) -> None:
        """Declare the workers lost when they do not become ready in time."""
        limit = self._engine.start_timeout_s
        if self._spawned is not None and time.monotonic() - self._spawned >= limit:
            if self._owns_fork_server:
                self._fork_server.close()  # it may be what hangs; the next fork starts another
            self.declare_lost(self._not_ready())

    def declare_lost(self, error: ServiceError) -> None:
        """Kill what is left of an epoch, notify the listeners, start the next epoch."""
        if self._stopping:
            return
        lost = self.epoch
        was_ready = self._all_ready.is_set()
        self.epoch += 1
        logger.error("epoch %d of the ranks is lost: %s", lost, error)
        self._all_ready.clear()
        self._spawned = None
        self._kill_all()
        for notify in self._loss_listeners:
            notify(lost, error)
        self._start_failures = 0 if was_ready else self._start_failures + 1
        tried_enough = self._start_failures >= _MAX_START_FAILURES
        if error.reason is Reason.STORAGE_FULL:
            tried_enough = False  # a disk can be emptied
        if tried_enough or error.reason is Reason.MODEL_INVALID:
            self._failure = error
            self._all_ready.set()  # wakes wait_ready, which raises the failure
            return
        self._restarter = asyncio.create_task(self.restart(), name="worker-restarter")

    async def restart(self) -> None:
        """Start the next epoch, after a pause that grows with each failed start."""
        await asyncio.sleep(min(2.0**self._start_failures - 1, 10.0))
        await self._remove_folder()
        logger.info("starting epoch %d of the ranks", self.epoch)
        try:
            self._spawn()
        except ServiceError as error:
            self.declare_lost(error)

    async def _remove_folder(self) -> None:
        """Remove what the workers of the last epoch left, once they are all gone."""
        for worker in self._workers:
            await worker.wait(_STOP_GRACE_S)
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None

    def _kill_all(self) -> None:
        for worker in self._workers:
            worker.kill()
