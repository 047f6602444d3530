"""Planning refuses what context and memory cannot hold, and says what would fit."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.job import PrefillSpec
from prefill_service.video.store import VideoStore
from tests.support.simulated_backends import FRAME_BYTES, LAYOUT, TOKENS_PER_FRAME, SimulatedPlanner


@asynccontextmanager
async def admitting(
    tmp_path: Path, template: tuple[Path, str], planner: Any, **options: Any
) -> AsyncIterator[tuple[Admission, str]]:
    """An admission on a copy of the template's videos, and the id of the one."""
    source, video_id = template
    data = Path(shutil.copytree(source, tmp_path / "data"))
    videos = VideoStore.open(StorageConfig(data_dir=str(data)), VideoConfig())
    admission = Admission(videos, planner, lambda: 4096, **options)
    try:
        yield admission, video_id
    finally:
        admission.close()
        await videos.close()


class Unread(SimulatedPlanner):
    """A planner that must not see a text."""

    def plan(self, *arguments: Any, **named: Any) -> PrefixPlan:
        if arguments[3]:
            raise AssertionError("planned")
        return super().plan(*arguments, **named)

    def prompt_token_ids(self, *arguments: Any) -> list[int]:
        raise AssertionError("tokenized")

    def count_tokens(self, texts: Sequence[str], most: int) -> int:
        raise AssertionError("counted")


async def test_texts_that_the_context_cannot_hold_are_refused_unread(
    tmp_path: Path, template: tuple[Path, str]
) -> None:
    async with admitting(tmp_path, template, Unread()) as (admission, video_id):
        with pytest.raises(ServiceError) as caught:
            await admission.plan_prefix(PrefillSpec(video_id, system_prompt="é" * 500_000))
        assert caught.value.reason is Reason.CONTEXT_EXCEEDED
        assert caught.value.message == (
            "spec.system_prompt has 1000000 bytes, and 24576 at most would fit, but the context "
            "holds 4096 tokens, with video, question and answer: shorten the system prompt"
        )
        assert caught.value.metadata["advice"] == "shorten the system prompt"
        plan = await admission.plan_prefix(PrefillSpec(video_id))
        for messages in (
            [("user", "x" * 1_000_000)],
            [("user", "x" * 10_000), ("assistant", "y" * 10_000), ("user", "z" * 5_000)],
        ):
            with pytest.raises(ServiceError) as caught:
                await admission.prompt_token_ids(plan, messages)
            assert caught.value.reason is Reason.QUESTION_TOO_LONG
            assert caught.value.metadata["limit"] == str(6 * (4096 - plan.num_tokens))


class Counted(Unread):
    """A planner that must not see a text whole."""

    def count_tokens(self, texts: Sequence[str], most: int) -> int:
        return sum(map(len, texts))


async def test_texts_that_may_be_too_long_are_counted_first(
    tmp_path: Path, template: tuple[Path, str]
) -> None:
    text = "x" * (4 * 4096)
    async with admitting(tmp_path, template, Counted()) as (admission, video_id):
        with pytest.raises(ServiceError, match=r"makes 16384 tokens or more") as caught:
            await admission.plan_prefix(PrefillSpec(video_id, system_prompt=text))
        assert caught.value.reason is Reason.CONTEXT_EXCEEDED
        plan = await admission.plan_prefix(PrefillSpec(video_id))
        with pytest.raises(ServiceError, match=r"make 16384 tokens") as caught:
            await admission.prompt_token_ids(plan, [("user", text)])
        assert caught.value.reason is Reason.QUESTION_TOO_LONG


async def test_a_system_prompt_that_leaves_the_video_no_room_is_named(
    tmp_path: Path, template: tuple[Path, str]
) -> None:
    class Texts(SimulatedPlanner):
        def plan(self, *arguments: Any, **named: Any) -> PrefixPlan:
            plan = super().plan(*arguments, **named)
            text = len(arguments[3])
            ids = np.zeros(plan.num_tokens + text, np.int32)
            return replace(plan, token_ids=ids, placeholder=(text, plan.num_tokens))

    async with admitting(tmp_path, template, Texts()) as (admission, video_id):
        with pytest.raises(ServiceError, match=r"prompt \(3500 tokens\) and video make") as caught:
            await admission.plan_prefix(
                PrefillSpec(video_id, FrameSampling(num_frames=40), system_prompt="x" * 3500)
            )
        room = 4096 - 512 - 3500
        fitting = room // TOKENS_PER_FRAME
        assert caught.value.metadata["advice"] == f"num_frames={fitting} would fit."
        with pytest.raises(ServiceError, match=r"system_prompt makes 4000 tokens") as caught:
            await admission.plan_prefix(PrefillSpec(video_id, system_prompt="x" * 4000))
        assert caught.value.metadata["advice"] == "shorten the system prompt"


async def test_a_prefix_beyond_the_budget_is_refused_with_advice(
    tmp_path: Path, template: tuple[Path, str]
) -> None:
    budget = KVBudget(LAYOUT, pool_bytes=10 * FRAME_BYTES, working_bytes=1)
    async with admitting(tmp_path, template, SimulatedPlanner(), memory=budget) as (
        admission,
        video_id,
    ):
        plan = await admission.plan_prefix(PrefillSpec(video_id, FrameSampling(num_frames=10)))
        assert plan.num_tokens == 10 * TOKENS_PER_FRAME
        spec = PrefillSpec(video_id, FrameSampling(num_frames=12))
        for _ in range(2):  # planned, then taken from the cache
            with pytest.raises(
                ServiceError, match=r"or: num_frames=10 would fit \[KV_POOL"
            ) as caught:
                await admission.plan_prefix(spec)
            assert caught.value.reason is Reason.KV_POOL_FULL
            assert caught.value.metadata["needed_bytes"] == str(12 * FRAME_BYTES)
            assert caught.value.metadata["pool_bytes"] == str(10 * FRAME_BYTES)
