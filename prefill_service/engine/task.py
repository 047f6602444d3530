"""A task on one rank, whatever computes it: run in step with the other ranks, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from prefill_service.attention.report import RankAttention
from prefill_service.attention.settings import SparseSettings
from prefill_service.engine import resolve
from prefill_service.engine.agreement import (
    SyncInterval,
    TaskAborted,
    TaskControl,
    fail_together,
    preemption_point,
    sync_point,
)
from prefill_service.engine.frame_prefetch import FramePrefetcher
from prefill_service.engine.messages import PrefillTask, Progress, RankDone, WorkerSpec
from prefill_service.engine.shard_map import pages_of_rank
from prefill_service.engine.spans import Stage, StageClock
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.manifest import KVLayout
from prefill_service.kv.offload.offload_report import OffloadReport
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.page_writer import ShardWriter
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.token_layout import Share
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.frame_stream import FrameStream

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker has for every task of one subgroup.

    Attributes:
        spec: what the worker was started with; ``spec.rank`` is its rank among all, while
            ``group.rank`` is its place in the subgroup.
        meshes: the subgroup's ranks, by Ulysses degree.
        sparse: sizes of sparse attention.
        send: sends a message to the front end.
        report_progress: called after each unit of work, so that the worker does not count as
            stalled.
    """

    spec: WorkerSpec
    model: PrefillModel
    store: ShardStore
    decoders: DecoderPool
    sparse: SparseSettings
    meshes: Mapping[int, SPMesh]
    send: Callable[[object], None]
    report_progress: Callable[[], None]

    @property
    def group(self) -> SPGroup:
        """The process group of the subgroup's ranks."""
        return self.meshes[1].world

    @property
    def kv_layout(self) -> KVLayout:
        """The shape of a KV page."""
        return self.store.layout

    @property
    def chunk_tokens(self) -> int:
        """Tokens per chunk and rank."""
        return resolve.chunk_tokens(self.spec.engine, self.spec.device)

    @property
    def runtime_dir(self) -> Path:
        """Where offloaded KV of a worker on the CPU goes."""
        return Path(self.spec.runtime_dir)

    def kv_budget(self, exchange: ExchangeChoice) -> KVBudget:
        """Bounds on the KV of a prefix that the subgroup computes with ``exchange``."""
        spec = self.spec
        return resolve.kv_budget(
            spec.engine,
            spec.checkpoint,
            spec.dtype,
            device=spec.device,
            exchange=exchange,
            ranks=self.group.size,
        )

    def make_clock(self, job_id: str) -> StageClock:
        """A clock that sends a job's progress to the front end."""

        def report(stage: Stage, done: int, total: int, seconds: float) -> None:
            self.send(
                Progress(
                    job_id=job_id,
                    rank=self.spec.rank,
                    stage=stage,
                    done=done,
                    total=total,
                    elapsed_s=seconds,
                )
            )

        return StageClock(report)


@dataclass(frozen=True, slots=True)
class RankTask:
    """A task on one rank, and what a way to compute it needs.

    Attributes:
        writer: takes the keys and values of this rank's pages.
        control: what the front end wants of the task while it runs.
        clock: progress, seconds and spans of the task on this rank.
        streams: the frame streams that have been opened.
    """

    worker: WorkerContext
    task: PrefillTask
    writer: ShardWriter
    control: TaskControl
    clock: StageClock
    streams: list[FrameStream] = field(default_factory=list)

    def make_prefetcher(self, shares: Sequence[Share]) -> FramePrefetcher:
        """A prefetcher, not started, of the frames of this rank's shares."""
        plan = self.task.plan
        preprocess = self.worker.model.preprocessor(plan)
        return FramePrefetcher(
            self._open_frames,
            preprocess,
            plan.frame_indices,
            preprocess.frames_per_patch,
            shares=shares,
            on_frames=self._report_frames,
            spans=self.clock.spans,
        )

    def _open_frames(self, indices: Sequence[int]) -> FrameStream:
        """Decode some frames of the task's video (``FrameStream``)."""
        stream = FrameStream.open(
            Path(self.task.video_path),
            Path(self.task.index_path),
            indices,
            self.worker.spec.video,
            square_pixels=self.task.plan.square_pixels,
            pool=self.worker.decoders,
        )
        self.streams.append(stream)
        return stream

    def _report_frames(self, done: int, total: int, seconds: float) -> None:
        self.worker.report_progress()
        self.clock.update(Stage.DECODE, done=done, total=total, seconds=seconds)

    def sync_point(
        self, interval: SyncInterval | None = None, error: ServiceError | None = None
    ) -> None:
        """Go on with all ranks of the subgroup, or stop with them (``agreement.sync_point``)."""
        sync_point(self.worker.group, self.control, interval=interval, error=error)

    def preemption_point(self, interval: SyncInterval, error: ServiceError | None) -> bool:
        """A ``sync_point`` at which the task may pause (``agreement.preemption_point``)."""
        return preemption_point(self.worker.group, self.control, interval=interval, error=error)

    def fail_together(self, error: ServiceError) -> NoReturn:
        """Stop the task on all ranks of the subgroup (``agreement.fail_together``)."""
        fail_together(self.worker.group, self.control, error)


class PrefillMethod(Protocol):
    """A way to compute a task on one rank."""

    def execute(self) -> None:
        """Compute the whole task."""

    def close(self) -> None:
        """Stop what runs in the background; also after ``execute`` has failed."""

    def attention_report(self) -> RankAttention | None:
        """What was measured of the attention, if anything was."""

    def offload_report(self) -> OffloadReport | None:
        """What offloading KV took, if any had to be offloaded."""


BuildMethod = Callable[[RankTask], PrefillMethod]
"""``ChunkedPrefill.build``, or another way to compute a prefix. It starts nothing."""


def run_task(
    worker: WorkerContext, task: PrefillTask, control: TaskControl, build: BuildMethod
) -> RankDone:
    """Compute this rank's part of the task, in step with the other ranks of its subgroup.

    Raises:
        TaskAborted: on every rank, when the task was cancelled or one failed with a ServiceError.
    """
    with worker.group.comm_stats.anew():
        return _run_task(worker, task, control, build)


def _run_task(
    worker: WorkerContext, task: PrefillTask, control: TaskControl, build: BuildMethod
) -> RankDone:
    manifest = task.manifest
    # A rank without any share (fewer patches than ranks) holds one unused page.
    pages = max(1, pages_of_rank(manifest.runs, worker.spec.rank, worker.kv_layout))
    try:
        writer = worker.store.create_pages(manifest.prefix_id, manifest.epoch, pages)
    except ServiceError as error:
        fail_together(worker.group, control, error)
    clock = worker.make_clock(task.job_id)
    with ExitStack() as stack:
        try:
            rank_task = RankTask(
                worker=worker, task=task, writer=writer, control=control, clock=clock
            )
            method = build(rank_task)
            stack.callback(method.close)
            method.execute()
        except TaskAborted as aborted:
            stopped = ServiceError(Reason.PREFILL_FAILED, "the prefill was stopped")
            writer.fail(aborted.error or stopped)
            worker.store.drop_prefix(manifest.prefix_id)
            raise
    offloaded = method.offload_report()
    if offloaded:
        logger.info(
            "%s: %d bytes of KV offloaded, %d moved, %.2f s stalled; at most %d on the device",
            task.job_id,
            offloaded.offloaded_bytes,
            offloaded.moved_bytes,
            offloaded.stalled_s,
            offloaded.high_water_bytes,
        )
    return RankDone(
        job_id=task.job_id,
        rank=worker.spec.rank,
        stage_seconds={str(stage): seconds for stage, seconds in clock.seconds.items()},
        communication=worker.group.comm_stats.since({}),
        attention=method.attention_report(),
        offloaded=offloaded,
        spans=clock.spans.spans(),
        unlisted_frames=sum(stream.unlisted for stream in rank_task.streams),
    )
