"""What the front end and the workers send to each other, pickled over a pipe."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import RankAttention
from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.cost_model.fitting import Observation
from prefill_service.engine.spans import Span, Stage
from prefill_service.kv.manifest import Manifest
from prefill_service.kv.offload.offload_report import OffloadReport
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.baselines.methods import BaselineMethod
from prefill_service.parallel.comm_stats import CollectiveUse
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One rank of one epoch of the workers: the first message that a worker gets.

    Attributes:
        init_method: torch's rendezvous.
        runtime_dir: for sockets and files; short, since Unix socket paths are.
    """

    rank: int
    epoch: int
    engine: EngineConfig
    video: VideoConfig
    checkpoint: Checkpoint
    dtype: str
    device: str
    threads: int
    init_method: str
    runtime_dir: str


@dataclass(frozen=True, slots=True)
class BaselineTask:
    """How to compute a prefix by a published method instead (``parallel.baselines``).

    Attributes:
        method: the method with its lengths.
        question_ids: tokens after the prefix, which the method consults. Their KV is not kept.
    """

    method: BaselineMethod
    question_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """One prefix to compute; a ``baseline`` uses neither the policy nor the exchange.

    Attributes:
        subgroup: the ranks that compute it, and whose pages the manifest names.
        whole_units: whether ranks get whole selection units of a chunk; with the plan, the
            subgroup and the exchange it determines the token layout (``shard_map.token_layout``).
        base: the prefix that this one extends by text. The ranks hold its pages, and compute the
            tokens after it, exactly.
    """

    job_id: str
    plan: PrefixPlan
    manifest: Manifest
    video_path: str
    index_path: str
    subgroup: Subgroup
    policy: AttentionPolicy = field(default_factory=lambda: resolve_policy(Quality.EXACT))
    exchange: ExchangeChoice = field(default_factory=ExchangeChoice)
    whole_units: bool = False
    baseline: BaselineTask | None = None
    base: Manifest | None = None


# ---- front end to worker ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartTask:
    """Start a task. The ranks of its subgroup get it when each of them is free or paused."""

    task: PrefillTask


@dataclass(frozen=True, slots=True)
class CancelTask:
    """Stop a task at the next synchronisation point."""

    job_id: str


@dataclass(frozen=True, slots=True)
class PauseTask:
    """Interrupt a task at the next chunk, if it has one, so that others can run meanwhile."""

    job_id: str


@dataclass(frozen=True, slots=True)
class ResumeTask:
    """Go on with a paused task. Sent once all of its ranks have said ``TaskPaused``."""

    job_id: str


@dataclass(frozen=True, slots=True)
class GrantLease:
    """Create or renew a lease on a prefix's pages for ``ttl_s`` seconds from now."""

    prefix_id: str
    lease_id: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """End a lease."""

    prefix_id: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class DropPrefix:
    """Free a prefix's pages."""

    prefix_id: str


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Cancel all tasks and exit."""


# ---- worker to front end ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """The model is loaded and the process group has formed.

    Attributes:
        endpoint: where the worker serves its pages.
        sparse_from_tokens: prompts of at least this many tokens are sparse; the same on all ranks.
        observed: what the start-up probe measured, if the exchange is ``auto``.
    """

    rank: int
    endpoint: str
    device: str
    sparse_from_tokens: int
    observed: tuple[Observation, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent every second; ``units_done`` grows with every unit of work (layer, frame)."""

    rank: int
    units_done: int
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
class TaskPaused:
    """A task is interrupted on this rank, which can run others until ``ResumeTask``."""

    job_id: str
    rank: int


@dataclass(frozen=True, slots=True)
class RankDone:
    """A task has succeeded on this rank.

    Attributes:
        unlisted_frames: frames whose stored size the video's index does not list.
    """

    job_id: str
    rank: int
    stage_seconds: dict[str, float] = field(default_factory=dict)
    communication: dict[str, CollectiveUse] = field(default_factory=dict)
    attention: RankAttention | None = None
    offloaded: OffloadReport | None = None
    spans: tuple[Span, ...] = ()
    unlisted_frames: int = 0


@dataclass(frozen=True, slots=True)
class RankFailed:
    """A task ended on this rank with an error; the worker lives on."""

    job_id: str
    rank: int
    error: dict[str, object]


@dataclass(frozen=True, slots=True)
class WorkerCrashed:
    """The worker cannot go on; it exits after this."""

    rank: int
    error: dict[str, object]
