"""The checks of a request before any work: a plan that fits the model, sampling parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from prefill_service.attention.head_budgets import HeadBudgets
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.engine.messages import BaselineTask
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import Sampling
from prefill_service.kv.budget import KVBudget
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.scheduling.job import PrefillSpec
from prefill_service.scheduling.planner_threads import PlannerThreads
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

if TYPE_CHECKING:
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.video.store import HeldVideo, VideoStore

BYTES_PER_TOKEN = 6
"""Text of more bytes for each token of the context is refused unread: prose has 4 to 5."""

FEW_BYTES = 3
"""Text of fewer bytes for each token that there is room for is taken to fit: no need to count."""

FRAMES_LIKE_TOKEN = 16
"""Frames of an index that are as much work to read as a token."""

CACHED_TOKENS = 1 << 22
"""Tokens of the plans that are kept, 28 bytes each; those used last."""

CACHED_INDEXES = 4
"""Indexes of videos that are kept: of 2,000,000 frames, 34 MB each."""

DEFAULT_MAX_TOKENS = 256

_PlanKey: TypeAlias = tuple[str, FrameSampling, str, str]


class Admission:
    """Plans prefixes and builds prompts, off the event loop.

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
        self._plans = _PlanCache()
        self._indexes: OrderedDict[str, VideoIndex] = OrderedDict()
        self._threads = PlannerThreads()

    def close(self) -> None:
        """Let the planner's threads end."""
        self._threads.close()

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
        self._check_system_prompt(spec.system_prompt)
        async with self._videos.hold_video(spec.video_id) as video:
            return await self.plan_held(spec, video)

    async def plan_held(self, spec: PrefillSpec, video: HeldVideo) -> PrefixPlan:
        """``plan_prefix`` for a caller that holds the video already."""
        attention_key = self.attention_key(spec)
        key = (video.record.sha256, spec.sampling, spec.system_prompt, attention_key)
        plan = self._plans.find(key)
        if plan is None:
            plan = await self._make_plan(spec, video)
            self._plans.add(key, plan)
        if plan.num_tokens >= self.limit:
            raise await self._exceeded(plan.num_tokens, spec, video, plan=plan)
        if self._memory is not None and plan.num_tokens > self._memory.fitting_tokens:
            advice = await self._suggest(spec, video, self._memory.fitting_tokens)
            raise self._memory.refusal(plan.num_tokens, advice)
        await self.baseline_task(spec, plan)
        return plan

    async def _make_plan(self, spec: PrefillSpec, video: HeldVideo) -> PrefixPlan:
        """A new plan, unless its video alone would make far more tokens than the context holds."""
        index = await self._load_index(video)
        estimate = await self._threads.call(
            index.frame_count // FRAMES_LIKE_TOKEN,
            self._planner.estimate_tokens,
            index,
            spec.sampling,
        )
        if estimate > 2 * self.limit:
            raise await self._exceeded(estimate, spec, video)
        text = await self._count_text([spec.system_prompt], self.limit)
        if text >= self.limit:
            raise self._prompt_too_long(f"makes {text} tokens or more", text)
        return await self._threads.call(
            estimate + text_bytes(spec.system_prompt) // FEW_BYTES,
            partial(self._planner.plan, attention_key=self.attention_key(spec)),
            index,
            video.record.sha256,
            spec.sampling,
            spec.system_prompt,
        )

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
                the context has room for or the configuration allows.
        """
        room = self.limit - plan.num_tokens
        what = "what the context leaves"
        if 0 < self._max_question_tokens < room:
            room = self._max_question_tokens
            what = "vllm.max_question_tokens"
        texts = [text for _, text in messages]
        size = sum(map(text_bytes, texts))
        if size > BYTES_PER_TOKEN * room:
            raise ServiceError(
                Reason.QUESTION_TOO_LONG,
                f"the messages have {size} bytes; the limit is {BYTES_PER_TOKEN * room}: "
                f"{room} tokens ({what}), {BYTES_PER_TOKEN} bytes for each. Shorten them",
                bytes=size,
                limit=BYTES_PER_TOKEN * room,
            )

        def check(tokens: int) -> None:
            if tokens > room:
                raise ServiceError(
                    Reason.QUESTION_TOO_LONG,
                    f"the messages make {tokens} tokens; the limit is {room} ({what})",
                    tokens=tokens,
                    limit=room,
                )

        check(await self._count_text(texts, room))
        token_ids = await self._threads.call(
            size // FEW_BYTES, self._planner.prompt_token_ids, plan, messages
        )
        check(len(token_ids) - plan.num_tokens)
        return token_ids

    # ---- texts ----------------------------------------------------------------------------

    def _check_system_prompt(self, text: str) -> None:
        """Refuse a system prompt that the context cannot hold, without tokenizing it."""
        size = text_bytes(text)
        most = BYTES_PER_TOKEN * self.limit
        if size > most:
            raise self._prompt_too_long(f"has {size} bytes, and {most} at most would fit", size)

    def _prompt_too_long(self, what: str, size: int) -> ServiceError:
        return ServiceError(
            Reason.CONTEXT_EXCEEDED,
            f"spec.system_prompt {what}, but the context holds {self.limit} tokens, with video, "
            "question and answer: shorten the system prompt",
            name="spec.system_prompt",
            size=size,
            limit=self.limit,
            advice="shorten the system prompt",
        )

    async def _count_text(self, texts: Sequence[str], most: int) -> int:
        """Tokens of texts, if they may be more than ``most``; else 0, and they are not read."""
        size = sum(map(text_bytes, texts))
        if size <= most * FEW_BYTES:
            return 0
        return await self._threads.call(size // FEW_BYTES, self._planner.count_tokens, texts, most)

    # ---- videos ---------------------------------------------------------------------------

    async def _load_index(self, video: HeldVideo) -> VideoIndex:
        index = self._indexes.get(video.record.sha256)
        if index is None:
            frames = video.record.info.frame_count if video.record.info else 0
            index = await self._threads.call(
                frames // FRAMES_LIKE_TOKEN, VideoIndex.load, video.index_path
            )
            self._indexes[video.record.sha256] = index
        self._indexes.move_to_end(video.record.sha256)
        while len(self._indexes) > CACHED_INDEXES:
            self._indexes.popitem(last=False)
        return index

    async def _exceeded(
        self, tokens: int, spec: PrefillSpec, video: HeldVideo, *, plan: PrefixPlan | None = None
    ) -> ServiceError:
        """What to say of a prompt that is too long.

        Args:
            tokens: of the prompt.
            plan: of the prompt, if there is one: then it is known what the system prompt takes.
        """
        limit = self.limit
        room = limit - min(512, limit // 4)  # for the question and its answer
        text = plan.placeholder[0] if plan is not None and spec.system_prompt else 0
        if text >= room:
            return self._prompt_too_long(f"makes {text} tokens", text)
        advice = await self._suggest(spec, video, room - text)
        what = f"system prompt ({text} tokens) and video make" if text else "the video makes"
        return ServiceError(
            Reason.CONTEXT_EXCEEDED,
            f"{what} a prompt of {tokens} tokens, but the context holds {limit}, "
            f"question and answer included. {advice}",
            tokens=tokens,
            limit=limit,
            advice=advice,
        )

    async def _suggest(self, spec: PrefillSpec, video: HeldVideo, room: int) -> str:
        index = await self._load_index(video)
        return await self._threads.call(
            index.frame_count // FRAMES_LIKE_TOKEN,
            self._planner.suggest_fit,
            index,
            spec.sampling,
            room,
        )


class _PlanCache:
    """The plans used last, as many as ``CACHED_TOKENS`` allows."""

    def __init__(self) -> None:
        self._plans: OrderedDict[_PlanKey, PrefixPlan] = OrderedDict()
        self._tokens = 0

    def find(self, key: _PlanKey) -> PrefixPlan | None:
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
        return plan

    def add(self, key: _PlanKey, plan: PrefixPlan) -> None:
        """Keep a plan, which may have been made by another call meanwhile."""
        if key in self._plans:
            return
        self._plans[key] = plan
        self._tokens += plan.num_tokens
        while self._tokens > CACHED_TOKENS and len(self._plans) > 1:
            _, dropped = self._plans.popitem(last=False)
            self._tokens -= dropped.num_tokens


def text_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text.encode())


def fit_sampling(
    sampling: Sampling,
    max_tokens: int | None,
    prompt_tokens: int,
    context: int,
    *,
    defaults: Mapping[str, float] = MappingProxyType({}),
) -> Sampling:
    """Settle the sampling parameters that are not given.

    They are the checkpoint's ``defaults``. ``max_tokens`` is 256 where those have none, or what
    room is left.

    Raises:
        ServiceError: QUESTION_TOO_LONG when the answer has no room.
    """
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
