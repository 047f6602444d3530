"""The checks of a request before any work: a plan that fits the model, sampling parameters."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from prefill_service.attention.head_budgets import HeadBudgets
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.engine.messages import BaselineTask
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import Sampling
from prefill_service.kv.budget import KVBudget
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.scheduling.job import PrefillSpec
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

if TYPE_CHECKING:
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.video.store import HeldVideo, VideoStore

CACHED_PLANS = 16
"""Plans kept, those used last."""

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16

T = TypeVar("T")


class Admission:
    """Plans prefixes, off the event loop, one at a time (processors are not thread-safe).

    Args:
        context_limit: vLLM's context in tokens, or 0 as long as that is unknown.
        budgets: how every request's epsilon is divided among heads.
        memory: bounds on a prefix's KV; without it only the workers refuse what does not fit.
        ranks: number of all ranks, on which a baseline's KV depends.
        max_question_tokens: most tokens that a request's messages may make; 0 for any number.
    """

    def __init__(
        self,
        videos: VideoStore,
        planner: PrefixPlanner,
        context_limit: Callable[[], int],
        *,
        budgets: HeadBudgets | None = None,
        memory: KVBudget | None = None,
        ranks: int = 1,
        max_question_tokens: int = 0,
    ) -> None:
        self._videos = videos
        self._planner = planner
        self._context_limit = context_limit
        self._budgets = budgets
        self._memory = memory
        self._ranks = ranks
        self._max_question_tokens = max_question_tokens
        self._plans: OrderedDict[tuple[str, FrameSampling, str, str], PrefixPlan] = OrderedDict()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")

    def close(self) -> None:
        """Let the planner's thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer together, at most."""
        model = self._planner.checkpoint.max_position_embeddings
        return min(model, self._context_limit() or model)

    @property
    def generation_defaults(self) -> Mapping[str, float]:
        """Sampling parameters of the checkpoint for requests that leave them out."""
        return self._planner.generation_defaults

    @property
    def fingerprint(self) -> str:
        """Identity of the model and its weights."""
        return self._planner.checkpoint.fingerprint

    def with_head_budgets(self, requested: AttentionPolicy) -> AttentionPolicy:
        """The policy that the ranks follow: the one requested, with the configured budgets."""
        return requested.with_budgets(self._budgets)

    def attention_key(self, spec: PrefillSpec) -> str:
        """How a prefix's KV is computed (``Manifest.attention_key``); part of its id."""
        if spec.comparison is not None:
            return spec.comparison.attention_key(self._ranks)
        return self.with_head_budgets(spec.attention).attention_key

    async def baseline_task(self, spec: PrefillSpec, plan: PrefixPlan) -> BaselineTask | None:
        """How the ranks compute a spec's baseline, if it has one.

        Raises:
            ServiceError: INVALID_REQUEST, the video is too short for it or its lengths are not
                possible; what ``prompt_token_ids`` raises of its question.
        """
        if spec.comparison is None:
            return None
        prompt = await self.prompt_token_ids(plan, [("user", spec.comparison.question)])
        return spec.comparison.make_task(plan, prompt[plan.num_tokens :], self._ranks)

    async def plan_prefix(self, spec: PrefillSpec) -> PrefixPlan:
        """Plan a prefix.

        Raises:
            ServiceError: UNKNOWN_VIDEO, VIDEO_NOT_READY, INVALID_REQUEST (the sampling does not
                suit the video), CONTEXT_EXCEEDED or KV_POOL_FULL (naming what would fit);
                what ``baseline_task`` raises.
        """
        async with self._videos.hold_video(spec.video_id) as video:
            return await self.plan_held(spec, video)

    async def plan_held(self, spec: PrefillSpec, video: HeldVideo) -> PrefixPlan:
        """``plan_prefix`` for a caller that holds the video already."""
        attention_key = self.attention_key(spec)
        key = (video.record.sha256, spec.sampling, spec.system_prompt, attention_key)
        plan = self._plans.get(key)
        if plan is None:
            # Token ids of a prompt far beyond the context would cost minutes and gigabytes.
            estimate = await self._call(self._estimate, video, spec.sampling)
            if estimate > 2 * self.limit:
                raise await self._exceeded(estimate, video, spec.sampling)
            plan = await self._call(self._make_plan, video, spec)
            self._plans[key] = plan
        self._plans.move_to_end(key)
        while len(self._plans) > CACHED_PLANS:
            self._plans.popitem(last=False)
        if plan.num_tokens >= self.limit:
            raise await self._exceeded(plan.num_tokens, video, spec.sampling)
        if self._memory is not None and plan.num_tokens > self._memory.fitting_tokens:
            fitting = self._memory.fitting_tokens
            advice = await self._call(self._suggest, video, spec.sampling, fitting)
            raise self._memory.refusal(plan.num_tokens, advice)
        await self.baseline_task(spec, plan)
        return plan

    def review_frames(self, geometry: Geometry) -> list[VideoWarning]:
        """A warning if no question can be asked about such frames, whatever is sampled."""
        try:
            self._planner.check_frames(geometry)
        except ServiceError as error:
            message = f"questions about this video will be refused: {error.message}"
            return [VideoWarning(WarningReason.FRAME_SHAPE, message)]
        return []

    async def prompt_token_ids(
        self, plan: PrefixPlan, messages: Sequence[tuple[str, str]]
    ) -> list[int]:
        """Token ids of the whole prompt.

        Raises:
            ServiceError: QUESTION_EMPTY, INVALID_REQUEST; QUESTION_TOO_LONG for more tokens than
                the configuration allows.
        """
        token_ids = await self._call(self._planner.prompt_token_ids, plan, messages)
        tokens = len(token_ids) - plan.num_tokens
        if 0 < self._max_question_tokens < tokens:
            raise ServiceError(
                Reason.QUESTION_TOO_LONG,
                f"the messages make {tokens} tokens; the limit is {self._max_question_tokens} "
                "(vllm.max_question_tokens)",
                tokens=tokens,
                limit=self._max_question_tokens,
            )
        return token_ids

    async def _exceeded(
        self, tokens: int, video: HeldVideo, sampling: FrameSampling
    ) -> ServiceError:
        limit = self.limit
        room = limit - min(512, limit // 4)  # for the question and its answer
        advice = await self._call(self._suggest, video, sampling, room)
        return ServiceError(
            Reason.CONTEXT_EXCEEDED,
            f"the video makes a prompt of {tokens} tokens, but the context holds {limit}, "
            f"question and answer included. {advice}",
            tokens=tokens,
            limit=limit,
            advice=advice,
        )

    def _make_plan(self, video: HeldVideo, spec: PrefillSpec) -> PrefixPlan:
        index = VideoIndex.load(video.index_path)
        return self._planner.plan(
            index,
            video.record.sha256,
            spec.sampling,
            spec.system_prompt,
            attention_key=self.attention_key(spec),
        )

    def _estimate(self, video: HeldVideo, sampling: FrameSampling) -> int:
        return self._planner.estimate_tokens(VideoIndex.load(video.index_path), sampling)

    def _suggest(self, video: HeldVideo, sampling: FrameSampling, limit: int) -> str:
        return self._planner.suggest_fit(VideoIndex.load(video.index_path), sampling, limit)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


def fit_sampling(
    sampling: Sampling,
    max_tokens: int | None,
    prompt_tokens: int,
    context: int,
    *,
    defaults: Mapping[str, float] = MappingProxyType({}),
) -> Sampling:
    """Check sampling parameters and settle those that are not given.

    They are the checkpoint's ``defaults``. ``max_tokens`` is 256 where those have none, or what
    room is left.

    Raises:
        ServiceError: INVALID_REQUEST; QUESTION_TOO_LONG when the answer has no room.
    """
    _check_sampling(sampling, max_tokens)
    wanted = max_tokens or 1
    if prompt_tokens + wanted > context:
        raise ServiceError(
            Reason.QUESTION_TOO_LONG,
            f"video and question take {prompt_tokens} tokens and the answer may take {wanted}, "
            f"but the context holds {context}",
            prompt_tokens=prompt_tokens,
            max_tokens=wanted,
            limit=context,
        )
    most = int(defaults.get("max_tokens", DEFAULT_MAX_TOKENS))
    room = min(most, context - prompt_tokens)
    return replace(sampling.fill_in(defaults), max_tokens=max_tokens or room)


def _check_sampling(sampling: Sampling, max_tokens: int | None) -> None:
    def check(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"sampling_params.{name} is {value!r}; it must be {accepted}",
                name=name,
                value=value,
                accepted=accepted,
            )

    check(max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
    temperature = sampling.temperature
    check(temperature is None or 0 <= temperature <= 100, "temperature", temperature, "0 to 100")
    top_p = sampling.top_p
    check(top_p is None or 0 < top_p <= 1, "top_p", top_p, "more than 0 and at most 1")
    top_k = sampling.top_k
    check(top_k is None or top_k >= -1, "top_k", top_k, "-1 (off), 0 (off) or more")
    seed = sampling.seed
    # vLLM would take -1 for no seed at all.
    check(seed is None or seed >= 0, "seed", seed, "0 to 9223372036854775807")
    penalty = sampling.repetition_penalty
    check(
        penalty is None or 0 < penalty <= 100,
        "repetition_penalty",
        penalty,
        "more than 0 and at most 100",
    )
    check(
        len(sampling.stop) <= MAX_STOP_STRINGS and all(sampling.stop),
        "stop",
        list(sampling.stop),
        f"at most {MAX_STOP_STRINGS} strings, none of them empty",
    )
