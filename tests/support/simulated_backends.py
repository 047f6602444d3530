"""A planner, an executor and a generation server that behave like the real ones, in-process.

They keep time, hold pages, know leases and epochs, die and come back. The video store and
the report socket beside them are the real ones.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import AttentionReport, BlockMap, LayerReport
from prefill_service.engine.messages import BaselineTask, PrefillTask, Progress
from prefill_service.engine.shard_map import baseline_runs, baseline_split
from prefill_service.engine.spans import Stage
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import GenerationEvent, GenerationRequest
from prefill_service.kv.handoff import HandoffReport
from prefill_service.kv.handoff_reports import send_report
from prefill_service.kv.manifest import KVLayout, Manifest, ShardRun
from prefill_service.kv.offload.offload_report import OffloadReport
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.parallel.comm_stats import CollectiveUse
from prefill_service.parallel.exchanges.registry import ExchangeChoice
from prefill_service.parallel.subgroups import Subgroup, form_subgroups
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex

TOKENS_PER_FRAME = 16
LAYOUT = KVLayout(num_layers=1, kv_heads=1, head_dim=4, dtype="float32", page_tokens=16)
ALL_RANKS = Subgroup(0, 2)
FRAME_BYTES = LAYOUT.page_bytes  # a frame is one page


class SimulatedPlanner:
    """``num_frames`` frames (8 by default) of 16 tokens each, and the characters as tokens."""

    def __init__(self) -> None:
        self.checkpoint = SimpleNamespace(fingerprint="model", max_position_embeddings=100_000)
        self.generation_defaults: dict[str, float] = {}

    def plan(
        self,
        index: VideoIndex,
        video_sha256: str,
        sampling: FrameSampling,
        system_prompt: str,
        *,
        attention_key: str = "exact",
    ) -> PrefixPlan:
        tokens = self.estimate_tokens(index, sampling)
        frames = tokens // TOKENS_PER_FRAME
        key = f"{video_sha256} {sampling} {system_prompt} {attention_key}"
        return PrefixPlan(
            prefix_id=hashlib.sha256(key.encode()).hexdigest(),
            family="qwen3_vl",
            token_ids=np.arange(tokens, dtype=np.int32),
            position_ids=np.zeros((3, tokens), np.int64),
            position_delta=-3,
            frame_indices=np.arange(frames),
            frame_seconds=np.arange(frames) / 2.0,
            patch_grid=(frames // 2, 8, 8),
            resized_hw=(128, 128),
            patch_ends=np.arange(1, frames // 2 + 1) * 2 * TOKENS_PER_FRAME,
            placeholder=(0, tokens),
            vllm_fields={},
            system_prompt=system_prompt,
            video_token_id=0,
            num_video_tokens=frames // 2 * 16,
            warnings=index.warnings,
        )

    def check_frames(self, geometry: Geometry) -> None:
        """Refuse what the families' processors refuse."""
        short, long = sorted(geometry.display_hw)
        if long > 200 * short:
            raise ServiceError(Reason.INVALID_REQUEST, f"aspect ratio {long / short:g} > 200")

    def prompt_token_ids(self, plan: PrefixPlan, messages: Sequence[tuple[str, str]]) -> list[int]:
        if not messages or not messages[-1][1].strip():
            raise ServiceError(Reason.QUESTION_EMPTY, "the question is empty")
        return [*plan.token_ids.tolist(), *map(ord, "".join(text for _, text in messages))]

    def count_tokens(self, texts: Sequence[str], most: int) -> int:
        return sum(map(len, texts))

    def estimate_tokens(self, index: VideoIndex, sampling: FrameSampling) -> int:
        frames = sampling.num_frames or 8
        if frames > 2 * index.frame_count:
            raise ServiceError(Reason.INVALID_REQUEST, f"{frames} frames of {index.frame_count}")
        return frames * TOKENS_PER_FRAME

    def suggest_fit(self, index: VideoIndex, sampling: FrameSampling, limit_tokens: int) -> str:
        return f"num_frames={limit_tokens // TOKENS_PER_FRAME} would fit."


def report(task: PrefillTask) -> AttentionReport:
    """Three layers of two KV heads, the later ones sparser; nothing of an exact task."""
    policy = task.policy
    plan = task.plan
    causal = plan.num_tokens * (plan.num_tokens + 1) / 2
    layers = []
    for number in range(0 if policy.exact else 3):
        density = [0.5 / (number + 1), 0.3 / (number + 1)]
        layer = LayerReport(number, [causal * d for d in density], causal, 20, 2, 1)
        layer.kept_mass.add_values(torch.linspace(0.8, 1, 101))
        layer.output_error.add_values(torch.linspace(0, 0.1, 101))
        layer.select_s = 0.25
        layer.attend_s = 1.0
        layer.verify_s = 0.125
        layers.append(layer)
    cells = [1.0 if row == column else 0.25 for row in range(4) for column in range(row + 1)]
    grid = [cells.pop(0) if column <= row else -1.0 for row in range(4) for column in range(4)]
    return AttentionReport(
        sparse_from_tokens=0 if policy.exact else 64,
        layers=layers,
        patch_mass=[] if policy.exact else [1.0 + 0.5 * i for i in range(len(plan.patch_ends))],
        block_map=None if policy.exact else BlockMap(2, 1, 4, 4, grid),
    )


class SimulatedExecutor:
    """Two ranks, which are their own supervisor.

    A task takes ``step_s`` per temporal patch, on whatever subgroup, beside any others. One that is
    paused for another goes on when that has ended. Ranks need ``stop_s`` to stop, and crash when
    they lose pages that they are writing.
    """

    endpoints = ("unix:/r0", "unix:/r1")
    all_ranks = ALL_RANKS
    observed = ()
    subgroups = form_subgroups(2)
    chunk_tokens = 64
    kv_layout = LAYOUT

    def __init__(self, restart_s: float = 0.1, start_s: float = 0.0) -> None:
        self.step_s = self.stop_s = 0.0
        self.unlisted_frames = 0
        self.restart_s = restart_s
        self.start_s = start_s
        self.epoch = 0
        self.ready = False
        self.supervisor = self
        self.listeners: list[Callable[[int, ServiceError], None]] = []
        self.failures: deque[ServiceError] = deque()
        self.started: list[str] = []
        self.tasks: list[PrefillTask] = []
        self.stopped: list[str] = []
        self.roomy = True
        self.held: set[str] = set()
        """Jobs that get no further for now."""
        self.paused: dict[str, asyncio.Event] = {}
        """Jobs that were paused, and whether they may go on."""
        self.pages: dict[str, asyncio.Event] = {}
        self.writing: set[str] = set()
        """Prefixes whose pages are being written, also by ranks that nobody waits for any more."""
        self.leases: dict[str, set[str]] = {}
        self._up = asyncio.Event()
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._restart: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await asyncio.sleep(self.start_s)
        self._come_up()

    async def stop(self) -> None:
        self.ready = False
        if self._restart:
            self._restart.cancel()

    async def wait_ready(self) -> None:
        await self._up.wait()

    def _come_up(self) -> None:
        self.ready = True
        self._death = asyncio.get_running_loop().create_future()
        self._up.set()

    def die(self, reason: Reason = Reason.RANK_DIED) -> None:
        lost = self.epoch
        self.epoch += 1
        self.ready = False
        self._up.clear()
        self.pages.clear()
        self.writing.clear()
        self.leases.clear()
        error = ServiceError(reason, "rank 1 was killed by SIGKILL", rank=1)
        self._death.set_exception(error)
        self._death.exception()
        for listener in self.listeners:
            listener(lost, error)

        async def restart() -> None:
            await asyncio.sleep(self.restart_s)
            self._come_up()

        self._restart = asyncio.create_task(restart())

    def add_loss_listener(self, listener: Callable[[int, ServiceError], None]) -> None:
        self.listeners.append(listener)

    def has_whole_units(
        self, plan: PrefixPlan, exchange: ExchangeChoice, policy: AttentionPolicy
    ) -> bool:
        return False

    def shard_map(
        self,
        plan: PrefixPlan,
        exchange: ExchangeChoice,
        subgroup: Subgroup,
        *,
        whole_units: bool = False,
    ) -> tuple[ShardRun, ...]:
        half = plan.num_tokens // 2
        if subgroup.size == 1:
            return (ShardRun(0, plan.num_tokens, subgroup.first, 0),)
        return (ShardRun(0, half, 0, 0), ShardRun(half, plan.num_tokens, 1, 0))

    def text_shard_map(
        self, base: Manifest, plan: PrefixPlan, subgroup: Subgroup
    ) -> tuple[ShardRun, ...]:
        return (ShardRun(base.num_tokens, plan.num_tokens, subgroup.first, 0),)

    def baseline_shard_map(
        self, plan: PrefixPlan, baseline: BaselineTask, subgroup: Subgroup
    ) -> tuple[ShardRun, ...]:
        return baseline_runs(baseline_split(plan, baseline, 2), LAYOUT, subgroup)

    def exchange_of(self, subgroup: Subgroup) -> ExchangeChoice:
        return ExchangeChoice()

    def fits(self, tokens: int, subgroup: Subgroup) -> bool:
        return True

    def fit_together(
        self, preempted: tuple[int, Subgroup], preempting: tuple[int, Subgroup]
    ) -> bool:
        return self.roomy

    async def prefill(
        self, task: PrefillTask, on_progress: Callable[[Progress], None], preempts: str = ""
    ) -> PrefillOutcome:
        if preempts:
            self.paused[preempts] = asyncio.Event()
        try:
            return await self._prefill(task, on_progress)
        finally:
            if preempts:
                self.paused[preempts].set()

    async def _prefill(
        self, task: PrefillTask, on_progress: Callable[[Progress], None]
    ) -> PrefillOutcome:
        assert task.manifest.epoch == self.epoch
        assert self.ready
        assert Path(task.video_path).exists()
        self.started.append(task.job_id)
        prefix_id = task.plan.prefix_id
        ready = self.pages[prefix_id] = asyncio.Event()
        self.writing.add(prefix_id)
        patches = len(task.plan.patch_ends)
        death = self._death
        try:
            for done in range(1, patches + 1):
                await asyncio.wait({death}, timeout=self.step_s)
                while not death.done() and self._is_held(task.job_id):
                    await asyncio.wait({death}, timeout=0.01)
                if death.done():
                    death.result()
                if self.failures and done > patches // 2:
                    self.writing.discard(prefix_id)
                    raise self.failures.popleft()
                for stage in Stage:
                    for rank in task.subgroup.members:
                        units = done
                        total = patches
                        if stage is Stage.PREFILL:
                            units = done * task.plan.num_tokens // patches // task.subgroup.size
                            total = task.plan.num_tokens // task.subgroup.size
                        on_progress(
                            Progress(
                                job_id=task.job_id,
                                rank=rank,
                                stage=stage,
                                done=units,
                                total=total,
                                elapsed_s=done * self.step_s,
                            )
                        )
        except asyncio.CancelledError:
            if self.stop_s:
                await asyncio.sleep(self.stop_s)
            self.writing.discard(prefix_id)
            self.stopped.append(task.job_id)
            raise
        self.writing.discard(prefix_id)
        ready.set()
        self.tasks.append(task)
        return PrefillOutcome(
            stage_seconds={"decode": 0.1},
            communication={"broadcast": CollectiveUse(1, 1, 0.01)},
            seconds=0.1,
            attention=report(task),
            offloaded=(OffloadReport(64, 32, 7, 0.5), OffloadReport(64, 32, 4, 0.25)),
            unlisted_frames=self.unlisted_frames,
        )

    def _is_held(self, job_id: str) -> bool:
        return job_id in self.held or (job_id in self.paused and not self.paused[job_id].is_set())

    def grant_lease(self, prefix_id: str, lease_id: str, ttl_s: float) -> None:
        assert ttl_s > 0
        self.leases.setdefault(prefix_id, set()).add(lease_id)

    def release_lease(self, prefix_id: str, lease_id: str) -> None:
        self.leases.get(prefix_id, set()).discard(lease_id)

    def drop_prefix(self, prefix_id: str) -> None:
        self.pages.pop(prefix_id, None)
        if prefix_id in self.writing:
            self.writing.remove(prefix_id)
            asyncio.get_running_loop().call_soon(self.die)

    @property
    def open_leases(self) -> int:
        return sum(map(len, self.leases.values()))


class SimulatedGenerationServer:
    """Pulls pages from the ranks like the connector, then says ``answer`` token by token."""

    def __init__(
        self, executor: SimulatedExecutor, max_model_len: int = 4096, start_s: float = 0.0
    ) -> None:
        self.executor = executor
        self.max_model_len = max_model_len
        self.start_s = start_s
        self.ready = False
        self.token_s = 0.0
        self.answer = ["A", " red", " car", "."]
        self.may_speak = asyncio.Event()
        """While it is not set, no token comes."""
        self.may_speak.set()
        self.faults: deque[ServiceError] = deque()
        """Hand-offs that fail, each reported like the connector does."""
        self.requests: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        await asyncio.sleep(self.start_s)
        self.come_up()

    async def stop(self) -> None:
        self.ready = False

    def come_up(self) -> None:
        self.ready = True
        self._death = asyncio.get_running_loop().create_future()

    def die(self) -> None:
        self.ready = False
        self._death.set_exception(ServiceError(Reason.DECODER_UNAVAILABLE, "vLLM died"))
        self._death.exception()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationEvent]:
        if not self.ready:
            raise ServiceError(Reason.DECODER_UNAVAILABLE, "vLLM is not ready")
        self.requests.append(request)
        finished = False
        try:
            await self._pull(request)
            words = self.answer[: request.sampling.max_tokens]
            for number, word in enumerate(words, start=1):
                await self._wait(asyncio.sleep(self.token_s))
                await self._wait(self.may_speak.wait())
                last = number == len(words)
                reason = ("stop" if words == self.answer else "length") if last else ""
                finished = last
                yield GenerationEvent(
                    word, (number,), reason, len(request.token_ids), number, cached_tokens=7
                )
        except ServiceError:
            finished = True
            raise
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    async def _pull(self, request: GenerationRequest) -> None:
        manifest = request.handoff.manifest
        lease_id = request.handoff.lease_id
        error = self.faults.popleft() if self.faults else None
        pages = self.executor.pages.get(manifest.prefix_id)
        if manifest.epoch != self.executor.epoch:
            error = ServiceError(Reason.STALE_GENERATION, "stale epoch")
        elif pages is None:
            error = ServiceError(Reason.UNKNOWN_PREFIX, "no such prefix")
        elif lease_id not in self.executor.leases.get(manifest.prefix_id, ()):
            error = ServiceError(Reason.LEASE_EXPIRED, "no such lease")
        elif error is None:
            await self._wait(pages.wait())
        report = HandoffReport(
            lease_id,
            error is None,
            manifest.num_tokens,
            1000,
            0.25,
            error.to_dict() if error else None,
        )
        await asyncio.to_thread(send_report, request.handoff.report_to, report)
        if error is not None:
            raise ServiceError(Reason.DECODER_FAILED, "vLLM answered 500")

    async def _wait(self, what: object) -> None:
        task = asyncio.ensure_future(what)  # type: ignore[arg-type]
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self._death.done():
            self._death.result()
