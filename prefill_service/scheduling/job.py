"""A prefill job as clients and the database have it (``JobRecord``), and while live (``Job``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import AttentionReport
from prefill_service.engine.messages import Progress
from prefill_service.engine.spans import Stage
from prefill_service.errors import ServiceError
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.parallel.comm_stats import CollectiveUse
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.attention_summary import (
    AttentionSummary,
    policy_from_dict,
    summarize,
)
from prefill_service.scheduling.baseline_spec import BaselineSpec
from prefill_service.video.index import VideoWarning, warnings_from_pairs


class JobState(StrEnum):
    """Life of a job (``prefill.v1.JobState``)."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EVICTED = "EVICTED"


ACTIVE = frozenset({JobState.QUEUED, JobState.RUNNING})


NO_POLICY = resolve_policy(Quality.EXACT)
"""The attention policy of a spec with a baseline."""


@dataclass(frozen=True, slots=True)
class PrefillSpec:
    """Names a video prefix (``prefill.v1.PrefillSpec``)."""

    video_id: str
    sampling: FrameSampling = field(default_factory=FrameSampling)
    system_prompt: str = ""
    attention: AttentionPolicy = field(default_factory=resolve_policy)
    comparison: BaselineSpec | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrefillSpec:
        """Rebuild a spec from ``dataclasses.asdict``.

        One without ``attention`` is of the first format, in which all attention was exact.
        """
        attention = data.get("attention")
        comparison = data.get("comparison")
        return cls(
            video_id=data["video_id"],
            sampling=FrameSampling.from_dict(data["sampling"]),
            system_prompt=data["system_prompt"],
            attention=policy_from_dict(attention) if attention else resolve_policy(Quality.EXACT),
            comparison=BaselineSpec.from_dict(comparison) if comparison else None,
        )


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """What a finished job offers (``prefill.v1.PrefillResult``).

    Attributes:
        shards: (first token, one past the last, rank) per run.
        kv_bytes: bytes of the pages over all ranks.
        attention: ``None`` of a baseline, whose attention is not measured.
        exchange, communication: how ranks met each other's keys, and what that moved; empty in
            jobs from before these were kept.
        unlisted_frames: frames whose stored size the video's index does not list.
        warnings: of the video, of its sampling and of what was found when frames were decoded.
    """

    prefix_id: str
    prefix_tokens: int
    video_tokens: int
    frames: int
    grid_thw: tuple[int, int, int]
    position_delta: int
    shards: tuple[tuple[int, int, int], ...]
    kv_bytes: int
    kv_transfer_params_json: str
    manifest_json: str
    attention: AttentionSummary | None
    exchange: str = ""
    communication: Mapping[str, CollectiveUse] = field(default_factory=dict)
    unlisted_frames: int = 0
    warnings: tuple[VideoWarning, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrefillResult:
        """Rebuild a result from ``dataclasses.asdict``, also one of an earlier format.

        The first format has no ``attention``: it was exact. In later ones it is None of a baseline.
        """
        attention = None
        if "attention" not in data:
            attention = summarize(resolve_policy(Quality.EXACT), AttentionReport())
        elif data["attention"] is not None:
            attention = AttentionSummary.from_dict(data["attention"])
        uses = data.get("communication", {})
        warnings = ((entry["reason"], entry["message"]) for entry in data.get("warnings", ()))
        rebuilt = {
            "grid_thw": tuple(data["grid_thw"]),
            "shards": tuple(tuple(shard) for shard in data["shards"]),
            "attention": attention,
            "communication": {name: CollectiveUse(**use) for name, use in uses.items()},
            "warnings": warnings_from_pairs(warnings),
        }
        return cls(**{**data, **rebuilt})


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One job, as clients see it and as the database keeps it.

    Attributes:
        explicit: created by CreatePrefillJob; otherwise it lives for the calls that wait for it.
        attempts: how often it has been started.
        error: ``ServiceError.to_dict`` when FAILED or CANCELLED.
        create_time, start_time, end_time: seconds since the epoch, 0 if not yet.
        progress: latest per stage and rank.
        queue_position: jobs ahead of a QUEUED one; not kept in the database.
    """

    job_id: str
    spec: PrefillSpec
    prefix_id: str
    prefix_tokens: int
    explicit: bool
    state: JobState = JobState.QUEUED
    attempts: int = 0
    create_time: float = 0.0
    start_time: float = 0.0
    end_time: float = 0.0
    error: Mapping[str, Any] | None = None
    result: PrefillResult | None = None
    progress: tuple[Progress, ...] = ()
    queue_position: int = 0

    @property
    def active(self) -> bool:
        """Queued or running."""
        return self.state in ACTIVE

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the inverse of ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> JobRecord:
        """Rebuild a record from its JSON form."""
        result = data["result"]
        progress = tuple(
            Progress(**{**item, "stage": Stage(item["stage"])}) for item in data["progress"]
        )
        return cls(
            **{
                **data,
                "spec": PrefillSpec.from_dict(data["spec"]),
                "state": JobState(data["state"]),
                "result": PrefillResult.from_dict(result) if result else None,
                "progress": progress,
            }
        )


@dataclass(frozen=True, slots=True)
class Extension:
    """What a job computes that extends a resident prefix by a question's text.

    Attributes:
        plan: of the prefix with its text.
        base: the job that has the prefix.
    """

    plan: PrefixPlan
    base: Job


@dataclass(slots=True, eq=False)
class Job:
    """A job that is queued, running or whose prefix is resident.

    Any number of tasks may wait for its next change. Changes are not queued: a slow waiter sees the
    latest state and misses those in between.
    """

    record: JobRecord
    extension: Extension | None = None
    waiters: int = 0
    """Calls that need it (``Scheduler.acquire``)."""
    cancelled_by: ServiceError | None = None
    """Set once it is being cancelled, which takes the ranks a moment."""
    task: asyncio.Task[None] | None = None
    subgroup: Subgroup | None = None
    """The ranks that it has, or had: they hold its pages."""
    version: int = 0
    ended_at: float = 0.0
    """``time.monotonic()`` of its end."""
    _progress: dict[tuple[Stage, int], Progress] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def update(self, **changes: Any) -> JobRecord:
        """Change the record and wake the waiters; returns the new record.

        Progress of an earlier attempt is forgotten when the job is queued or started.
        """
        if changes.get("state") in ACTIVE:
            self._progress.clear()
        self.record = replace(self.record, progress=tuple(self._progress.values()), **changes)
        if not self.record.active and not self._ended.is_set():
            self.ended_at = time.monotonic()
            self._ended.set()
        self.notify()
        return self.record

    def update_progress(self, progress: Progress) -> None:
        """Note how far a rank is, and wake the waiters."""
        self._progress[progress.stage, progress.rank] = progress
        self.notify()

    @property
    def tokens(self) -> int:
        """Tokens that the ranks compute for it."""
        before = self.extension.base.record.prefix_tokens if self.extension else 0
        return self.record.prefix_tokens - before

    @property
    def tokens_left(self) -> int:
        """Tokens of ``tokens`` that no rank has prefilled yet."""
        done = sum(p.done for (stage, _), p in self._progress.items() if stage is Stage.PREFILL)
        return max(0, self.tokens - done)

    @property
    def needed_subgroup(self) -> Subgroup | None:
        """The ranks that it must have: those that hold the pages which it extends."""
        return self.extension.base.subgroup if self.extension else None

    @property
    def needs_all_ranks(self) -> bool:
        """Whether it needs all ranks: a baseline's KV depends on how many there are."""
        return self.record.spec.comparison is not None

    def notify(self) -> None:
        """Wake the waiters."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def snapshot(self, queue_position: int = 0) -> JobRecord:
        """The record with the latest progress and its position in the queue."""
        return replace(
            self.record,
            progress=tuple(self._progress.values()) or self.record.progress,
            queue_position=queue_position,
        )

    async def wait_changed(self, version: int, min_interval_s: float = 0.1) -> None:
        """Return once the job differs from ``version``.

        It returns no sooner than after ``min_interval_s``, unless the job has ended.
        """
        if self.version == version:
            await self._changed.wait()
        if min_interval_s:
            await self.wait_ended(min_interval_s)

    async def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Wait until the job is neither queued nor running; False after ``timeout_s``."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
