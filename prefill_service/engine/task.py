"""A task on one rank, whatever computes it: begun, kept in step with the other ranks, reported."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from prefill_service.attention.report import RankAttention
from prefill_service.attention.settings import SparseSettings
from prefill_service.config import VideoConfig
from prefill_service.engine.agreement import SyncInterval
from prefill_service.engine.messages import PrefillTask, Progress, RankDone, Stage
from prefill_service.engine.shard_map import pages_of_rank
from prefill_service.engine.spans import Amount, SpanBuffer
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import KVLayout
from prefill_service.kv.offload.shape import OffloadReport
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.process_group import SPGroup
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.frame_stream import FrameStream

logger = logging.getLogger("prefill_service.task")

_PROGRESS_INTERVAL_S = 0.2
_MOST_MS = (1 << 20) - 1


class Status(IntEnum):
    """What ranks agree on at each synchronisation point; the largest wins."""

    FINE = 0
    CANCELLED = 1
    FAILED = 2


@dataclass(frozen=True, slots=True)
class TaskControl:
    """What others want of a task while it runs.

    Attributes:
        cancelled: it is to stop.
        pause: it is to let others run, once.
        stand_aside: lets them; returns when the task may go on.
    """

    cancelled: threading.Event
    pause: threading.Event
    stand_aside: Callable[[], None]


class TaskAborted(Exception):
    """All ranks agreed to stop this task; ``error`` is set on the rank that caused it."""

    def __init__(self, status: Status, error: ServiceError | None) -> None:
        super().__init__(status.name)
        self.status = status
        self.error = error


@dataclass(slots=True)
class StageClock:
    """Progress and seconds per stage, reported at most five times a second, and their spans."""

    report: Callable[[Stage, int, int, float], None]
    spans: SpanBuffer = field(default_factory=SpanBuffer)
    seconds: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(Stage, 0.0))
    _last: dict[Stage, float] = field(default_factory=dict)
    _parts: dict[Stage, int] = field(default_factory=dict)

    def add(self, stage: Stage, done: int, total: int, start: float, **args: Amount) -> None:
        """Note that work since ``start`` (perf_counter) brought ``done`` of ``total`` units.

        ``args`` go with its span.
        """
        number = self._parts[stage] = self._parts.get(stage, -1) + 1
        self.spans.note(stage, f"chunk {number}", start, **args)
        self.set(stage, done, total, self.seconds[stage] + time.perf_counter() - start)

    def set(self, stage: Stage, done: int, total: int, seconds: float) -> None:
        """Note that ``done`` of ``total`` units took ``seconds`` so far."""
        self.seconds[stage] = seconds
        now = time.monotonic()
        if done >= total or now - self._last.get(stage, 0.0) >= _PROGRESS_INTERVAL_S:
            self._last[stage] = now
            self.report(stage, done, total, seconds)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What this rank is and has, for every task of one team.

    Attributes:
        number: of this rank among all; ``group.rank`` is its place in the team.
        model, store: this rank's.
        meshes: the team's ranks, by Ulysses degree.
        kv_layout: of a page.
        budget: bounds on a prefix's KV, by the exchange that computes it.
        runtime_dir: where a CPU rank's offloaded KV goes.
        video, decoders: limits for decoding, and processes that wait to do it.
        chunk_tokens: tokens per chunk and rank.
        sparse: sizes of sparse attention.
        balance_above, balance_least_gflop: see ``EngineConfig``.
        send: delivers progress messages.
        tick: called after each unit of work; liveness for the heartbeat.
    """

    number: int
    model: PrefillModel
    meshes: Mapping[int, SPMesh]
    store: ShardStore
    kv_layout: KVLayout
    budget: Callable[[ExchangeChoice], KVBudget]
    runtime_dir: Path
    video: VideoConfig
    decoders: DecoderPool
    chunk_tokens: int
    sparse: SparseSettings
    balance_above: float
    balance_least_gflop: float
    send: Callable[[Progress], None]
    tick: Callable[[], None]

    @property
    def group(self) -> SPGroup:
        """The team's ranks."""
        return self.meshes[1].world

    def open_frames(self, task: PrefillTask, indices: Sequence[int]) -> FrameStream:
        """Some frames of the task's video, decoded for this rank (``FrameStream``)."""
        return FrameStream.open(
            Path(task.video_path), Path(task.index_path), indices, self.video, pool=self.decoders
        )


class TaskRun(Protocol):
    """One task in progress on one rank."""

    clock: StageClock

    def execute(self) -> None:
        """All of it."""

    def close(self) -> None:
        """Also after ``execute`` failed."""

    def report(self) -> RankAttention | None:
        """What was measured of its attention."""

    def offloaded(self) -> OffloadReport | None:
        """What offloading its keys took, if they had to be."""


def run_task(
    rank: WorkerContext,
    task: PrefillTask,
    control: TaskControl,
    begin: Callable[[WorkerContext, PrefillTask, ShardWriter, TaskControl], TaskRun],
) -> RankDone:
    """Compute this rank's share of the task, in step with the other ranks of its team.

    Args:
        begin: ``ChunkedPrefill``, or another way to compute a prefix.

    Raises:
        TaskAborted: on every rank, when one was cancelled or failed in a way it could name.
    """
    with rank.group.meter.anew():
        return _run_task(rank, task, control, begin)


def _run_task(
    rank: WorkerContext,
    task: PrefillTask,
    control: TaskControl,
    begin: Callable[[WorkerContext, PrefillTask, ShardWriter, TaskControl], TaskRun],
) -> RankDone:
    manifest = task.manifest
    # A rank without any share (fewer patches than ranks) holds one unused page.
    pages = max(1, pages_of_rank(manifest.runs, rank.number, rank.kv_layout))
    try:
        writer = rank.store.create_pages(manifest.prefix_id, manifest.generation, pages)
    except ServiceError as error:
        checkpoint(rank, control, error=error)  # the others' first one, wherever they get to it
        raise  # not reached: a checkpoint with an error raises on every rank
    run = None
    try:
        run = begin(rank, task, writer, control)
        run.execute()
    except TaskAborted as aborted:
        writer.fail(aborted.error or ServiceError(Reason.PREFILL_FAILED, "the prefill was stopped"))
        rank.store.drop_prefix(manifest.prefix_id)
        raise
    finally:
        if run is not None:
            run.close()
    if offloaded := run.offloaded():
        logger.info(
            "%s: %d bytes of KV offloaded, %d moved, %.2f s stalled; at most %d on the device",
            task.job_id, offloaded.offloaded_bytes, offloaded.moved_bytes, offloaded.stalled_s,
            offloaded.high_water_bytes,
        )  # fmt: skip
    return RankDone(
        task.job_id,
        rank.number,
        {str(stage): seconds for stage, seconds in run.clock.seconds.items()},
        rank.group.meter.since({}),
        run.report(),
        offloaded,
        run.clock.spans.spans(),
    )


def checkpoint(
    rank: WorkerContext,
    control: TaskControl,
    cadence: SyncInterval | None = None,
    error: ServiceError | None = None,
) -> None:
    """Synchronisation point: all ranks of the team go on, or all raise ``TaskAborted``."""
    _agree(rank, control, cadence, error, pause=False)


def between_chunks(
    rank: WorkerContext,
    control: TaskControl,
    cadence: SyncInterval,
    error: ServiceError | None = None,
) -> bool:
    """A ``checkpoint`` at which the task is paused if all of its ranks have been told to.

    No collective is left half-way, and none begins before all of them go on, so that a pause may
    last as long as it likes.

    Returns:
        Whether it was paused.
    """
    paused = _agree(rank, control, cadence, error, control.pause.is_set())
    if paused:
        control.pause.clear()
        control.stand_aside()
    return paused


def _agree(
    rank: WorkerContext,
    control: TaskControl,
    cadence: SyncInterval | None,
    error: ServiceError | None,
    pause: bool,
) -> bool:
    """The gravest status of all ranks counts; if that is none, whether all of them can pause.

    One number says both, and below them how long a layer takes: the largest is that of a rank with
    the gravest status, and every rank learns the same.
    """
    mine = Status.CANCELLED if control.cancelled.is_set() else Status.FINE
    told = 2 * (Status.FAILED if error else mine) + (not pause)
    layer_ms = min(cadence.layer_ms, _MOST_MS) if cadence else 0
    agreed, layer_ms = divmod(rank.group.agree(told * (_MOST_MS + 1) + layer_ms), _MOST_MS + 1)
    status = Status(agreed // 2)
    if status is not Status.FINE:
        raise TaskAborted(status, error)
    if cadence:
        cadence.agreed(layer_ms)
    return agreed == 0
