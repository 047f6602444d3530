"""What the front end and the rank processes say to each other (pickled over a pipe)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import RankAttention
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine.spans import Span
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.offload.shape import OffloadReport
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.baselines.method import BaselineMethod
from prefill_service.parallel.comm_stats import CollectiveUse
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup


class Stage(StrEnum):
    """Stages of the chunk pipeline (``prefill.v1.Stage``)."""

    DECODE = "decode"
    VISION = "vision"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class BaselineTask:
    """How to compute a prefix by a published method instead (``parallel.comparison``).

    Attributes:
        mode: the method with its lengths.
        question_ids: tokens after the prefix, which the method consults. Their KV is not kept.
    """

    mode: BaselineMethod
    question_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """One prefix to compute; with a ``comparison``, policy and exchange have no part in it.

    Attributes:
        team: the ranks that compute it, and whose pages the manifest names.
    """

    job_id: str
    plan: PrefixPlan
    manifest: Manifest
    video_path: str
    index_path: str
    team: Subgroup
    policy: AttentionPolicy = field(default_factory=lambda: resolve_policy(Quality.EXACT))
    exchange: ExchangeChoice = field(default_factory=ExchangeChoice)
    comparison: BaselineTask | None = None


# ---- front end to rank ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """Start a task. Its team's ranks get it, when none of them has another that goes on."""

    task: PrefillTask


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a task at the next synchronisation point."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Interrupt a task at the next chunk, if it has one, so that others can run meanwhile."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with a paused task. Sent once all of its ranks have said ``Paused``."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Grant:
    """Create or renew a lease on a prefix's pages for ``ttl_s`` seconds from now."""

    prefix_id: str
    lease_id: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """End a lease."""

    prefix_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Free a prefix's pages."""

    prefix_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave."""


# ---- rank to front end ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded and the group has formed.

    Attributes:
        sparse_from_tokens: prompts of so many tokens are sparse; all ranks say the same.
        observed: what a probe measured, where exchanges are planned.
    """

    rank: int
    endpoint: str
    device: str
    sparse_from_tokens: int
    observed: tuple[Observation, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent every second; ``ticks`` grows with every unit of work (layer, frame)."""

    rank: int
    ticks: int
    busy: bool


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank is in one stage of a job."""

    job_id: str
    rank: int
    stage: Stage
    done: int
    total: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Paused:
    """A task is interrupted on this rank, which can run others until ``Resume``."""

    job_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class RankDone:
    """A rank finished its part of a task."""

    job_id: str
    rank: int
    stage_seconds: dict[str, float] = field(default_factory=dict)
    communication: dict[str, CollectiveUse] = field(default_factory=dict)
    attention: RankAttention | None = None
    offloaded: OffloadReport | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A task ended on this rank with an error; the group lives on."""

    job_id: str
    rank: int
    error: dict[str, object]


@dataclass(frozen=True, slots=True)
class RankCrashed:
    """The rank cannot go on; it leaves after this."""

    rank: int
    error: dict[str, object]
