"""From a request's spec to a plan that fits the model: the checks made before any work."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from prefill_service.attention.head_budgets import HeadBudgetProfile
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.engine.messages import BaselineTask
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.scheduling.job import PrefillSpec
from prefill_service.video.index import VideoIndex

if TYPE_CHECKING:
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.video.store import HeldVideo, VideoStore

CACHED_PLANS = 16
T = TypeVar("T")


class Admission:
    """Plans prefixes, off the event loop, one at a time (processors are not thread-safe).

    Args:
        context_limit: the decoder's context in tokens, or 0 as long as that is unknown.
        budgets: how the heads share every request's epsilon.
        memory: bounds on a prefix's KV; without it only the ranks refuse what does not fit.
        ranks: of the group, on which a comparison's KV depends.
    """

    def __init__(
        self,
        videos: VideoStore,
        planner: PrefixPlanner,
        context_limit: Callable[[], int],
        budgets: HeadBudgetProfile | None = None,
        memory: KVBudget | None = None,
        ranks: int = 1,
    ) -> None:
        self._videos = videos
        self._planner = planner
        self._context_limit = context_limit
        self._budgets = budgets
        self._memory = memory
        self._ranks = ranks
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
    def fingerprint(self) -> str:
        """Identity of the model."""
        return self._planner.checkpoint.fingerprint

    def policy(self, asked: AttentionPolicy) -> AttentionPolicy:
        """What the ranks do where a request asks for ``asked``; names the prefix."""
        return asked.with_budgets(self._budgets)

    def profile(self, spec: PrefillSpec) -> str:
        """How a prefix's KV is computed; part of its id."""
        if spec.comparison is not None:
            return spec.comparison.profile(self._ranks)
        return self.policy(spec.attention).profile

    async def comparison(self, spec: PrefillSpec, plan: PrefixPlan) -> BaselineTask | None:
        """What the ranks do for a spec's comparison, if it has one.

        Raises:
            ServiceError: INVALID_REQUEST, the video is too short for it or its lengths cannot be;
                what ``prompt`` raises of its question.
        """
        if spec.comparison is None:
            return None
        prompt = await self.prompt(plan, [("user", spec.comparison.question)])
        return spec.comparison.task(plan, prompt[plan.num_tokens :], self._ranks)

    async def plan(self, spec: PrefillSpec) -> PrefixPlan:
        """Plan a prefix.

        Raises:
            ServiceError: UNKNOWN_VIDEO, VIDEO_NOT_READY, INVALID_REQUEST (the sampling does not
                suit the video), CONTEXT_EXCEEDED or KV_POOL_FULL (naming what would fit);
                what ``comparison`` raises.
        """
        async with self._videos.hold_video(spec.video_id) as video:
            return await self.plan_held(spec, video)

    async def plan_held(self, spec: PrefillSpec, video: HeldVideo) -> PrefixPlan:
        """``plan`` for a caller that holds the video already."""
        profile = self.profile(spec)
        key = (video.record.sha256, spec.sampling, spec.system_prompt, profile)
        plan = self._plans.get(key)
        if plan is None:
            # Token ids of a prompt far beyond the context would cost minutes and gigabytes.
            estimate = await self._call(self._estimate, video, spec.sampling)
            if estimate > 2 * self.limit:
                raise await self._exceeded(estimate, video, spec.sampling)
            plan = await self._call(self._plan, video, spec)
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
        await self.comparison(spec, plan)
        return plan

    async def prompt(self, plan: PrefixPlan, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of the whole prompt.

        Raises:
            ServiceError: QUESTION_EMPTY, INVALID_REQUEST.
        """
        return await self._call(self._planner.prompt_token_ids, plan, messages)

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

    def _plan(self, video: HeldVideo, spec: PrefillSpec) -> PrefixPlan:
        index = VideoIndex.load(video.index_path)
        return self._planner.plan(
            index,
            video.record.sha256,
            spec.sampling,
            spec.system_prompt,
            attention_key=self.profile(spec),
        )

    def _estimate(self, video: HeldVideo, sampling: FrameSampling) -> int:
        return self._planner.estimate_tokens(VideoIndex.load(video.index_path), sampling)

    def _suggest(self, video: HeldVideo, sampling: FrameSampling, limit: int) -> str:
        return self._planner.suggest_fit(VideoIndex.load(video.index_path), sampling, limit)

    async def _call(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
