"""A task in the front end while the ranks compute it, and what is reported of it afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prefill_service.attention.report import AttentionReport, combine
from prefill_service.engine import messages as msg
from prefill_service.engine.spans import Span, Stage
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.offload.offload_report import OffloadReport
from prefill_service.parallel.comm_stats import CollectiveUse, moved, total
from prefill_service.parallel.subgroups import Subgroup


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """What a finished task reports.

    Attributes:
        stage_seconds: per stage, the slowest rank's time.
        communication: collectives by name: calls and bytes of all ranks, the slowest one's time.
        seconds: wall clock.
        attention: over all ranks.
        offloaded: the reports of the ranks that had to offload their keys.
        paused_s: the part of ``seconds`` in which it was preempted.
        spans: what each rank did when.
        unlisted_frames: frames whose stored size the video's index does not list.
    """

    stage_seconds: dict[str, float]
    communication: dict[str, CollectiveUse]
    seconds: float
    attention: AttentionReport = field(default_factory=AttentionReport)
    offloaded: tuple[OffloadReport, ...] = ()
    paused_s: float = 0.0
    spans: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    unlisted_frames: int = 0

    @property
    def bytes_received(self) -> int:
        """Bytes received from other ranks, summed over all ranks, without status agreement."""
        return moved(self.communication)


@dataclass(slots=True)
class TaskState:
    """One task and what the ranks of its subgroup have answered so far."""

    job_id: str
    subgroup: Subgroup
    on_progress: Callable[[msg.Progress], None]
    future: asyncio.Future[None]
    done: dict[int, msg.RankDone] = field(default_factory=dict)
    failed: dict[int, ServiceError] = field(default_factory=dict)

    def settle(self) -> None:
        """Resolve once every rank has answered; the causing rank's error wins."""
        if len(self.done) + len(self.failed) < self.subgroup.size or self.future.done():
            return
        causes = [e for e in self.failed.values() if e.reason is not Reason.CANCELLED]
        if self.failed:
            self.future.set_exception([*causes, *self.failed.values()][0])
        else:
            self.future.set_result(None)

    async def settled(self, timeout_s: float) -> bool:
        """Wait until every rank has answered; False if they have not after ``timeout_s``.

        Cancelling the caller does not end the wait: ranks that still compute a task must not be
        taken for free, nor its pages be dropped, however often somebody cancels it.
        """
        deadline = time.monotonic() + timeout_s
        while not self.future.done() and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([self.future], timeout=left)
        return self.future.done()

    def not_stopped(self, timeout_s: float) -> ServiceError:
        """The error of a cancelled task that some of its ranks have not answered in time."""
        ranks = sorted(set(self.subgroup.members) - self.done.keys() - self.failed.keys())
        text = f"ranks {ranks} did not stop job {self.job_id} within {timeout_s:g} s"
        return ServiceError(Reason.RANK_STALLED, text, job_id=self.job_id, ranks=ranks)

    def outcome(self, seconds: float, paused_s: float = 0.0) -> PrefillOutcome:
        """The report of a task that has succeeded ``seconds`` after its start."""
        done = self.done.values()
        stages = {
            str(stage): max(rank.stage_seconds.get(str(stage), 0.0) for rank in done)
            for stage in Stage
        }
        communication = total(rank.communication for rank in done)
        measured = [rank.attention for rank in done if rank.attention is not None]
        attention = combine(measured) if measured else AttentionReport()
        offloaded = tuple(rank.offloaded for rank in done if rank.offloaded is not None)
        spans = {rank.rank: rank.spans for rank in done}
        return PrefillOutcome(
            stage_seconds=stages,
            communication=communication,
            seconds=seconds,
            attention=attention,
            offloaded=offloaded,
            paused_s=paused_s,
            spans=spans,
            unlisted_frames=sum(rank.unlisted_frames for rank in done),
        )
