"""The Qwen-VL families' plans: grids, sizes, and positions by vLLM's M-RoPE formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.pixels import FramePreprocessor
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.token_layout import deal_patches
from tests.models.test_prefix_planner import index_of
from tests.oracles.transformers_forward import processor_inputs


def qwen3_positions(prompt: list[int], feature: Any, config: Any) -> tuple[torch.Tensor, int]:
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration as Model

    return Model._get_mrope_input_positions(prompt, [feature], config)


def qwen2_5_positions(prompt: list[int], feature: Any, config: Any) -> tuple[torch.Tensor, int]:
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

    model: Any = SimpleNamespace(config=config)
    model.iter_mm_grid_thw = lambda features: Model.iter_mm_grid_thw(model, features)
    return Model.get_mrope_input_positions(model, prompt, [feature])


VLLM_POSITIONS = {"qwen3_vl": qwen3_positions, "qwen2_5_vl": qwen2_5_positions}
"""By family, vLLM's positions [3, tokens] and delta of a prompt with one video."""


@pytest.fixture(scope="module", params=VLLM_POSITIONS)
def planner(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> PrefixPlanner:
    return PrefixPlanner(open_checkpoint(str(checkpoint(request.param))), "float32")


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 64])
@pytest.mark.parametrize("size", [(160, 120), (333, 77), (90, 160)])
def test_plan_equals_the_processor_on_the_whole_video(
    planner: PrefixPlanner, frames: int, size: tuple[int, int]
) -> None:
    index = index_of(frames, width=size[0], height=size[1])
    plan = planner.plan(index, "sha", FrameSampling(fps=2.0), "")
    video = np.random.default_rng(frames).integers(
        0, 255, (len(plan.frame_indices), size[1], size[0], 3), dtype=np.uint8
    )
    text = planner.chat.prefix("")
    whole = processor_inputs(planner.checkpoint.path, video, plan, index, text=text)
    assert plan.token_ids.tolist() == whole["input_ids"][0].tolist()
    assert list(plan.patch_grid) == whole["video_grid_thw"][0].tolist()
    assert plan.num_video_tokens == int((plan.token_ids == plan.video_token_id).sum())

    preprocess = FramePreprocessor(
        FAMILIES[plan.family], planner._processor.video_processor, plan.resized_hw
    )
    parts = []
    for share in deal_patches(plan.patch_ends, 1, 100).of_rank(0):
        pixels = preprocess(list(share.select_patches(video, preprocess.frames_per_patch)))
        parts.append(pixels["pixel_values_videos"])
    assert torch.equal(torch.cat(parts), whole["pixel_values_videos"])


@pytest.mark.parametrize("frames", [2, 9, 400])
def test_positions_equal_vllms(planner: PrefixPlanner, frames: int) -> None:
    plan = planner.plan(index_of(frames, fps=1.7), "sha", FrameSampling(fps=1.3), "")
    prompt = planner.prompt_token_ids(plan, [("user", "what happens?")])
    positions, delta = VLLM_POSITIONS[plan.family](prompt, vllm_feature(plan), planner._config)
    assert torch.equal(positions[:, : plan.num_tokens], torch.from_numpy(plan.position_ids))
    assert delta == plan.position_delta


def vllm_feature(plan: PrefixPlan) -> SimpleNamespace:
    """The plan's video as vLLM's models see it."""
    from vllm.multimodal.inputs import PlaceholderRange

    data = {
        name: SimpleNamespace(data=torch.from_numpy(array))
        for name, array in plan.vllm_fields.items()
    }
    offset, length = plan.placeholder
    return SimpleNamespace(
        modality="video", data=data, mm_position=PlaceholderRange(offset=offset, length=length)
    )


def test_the_size_tells_prefixes_apart(planner: PrefixPlanner) -> None:
    index = index_of(40)
    small = planner.plan(index, "sha", FrameSampling(max_pixels=12_000), "")
    assert small.prefix_id != planner.plan(index, "sha", FrameSampling(), "").prefix_id


def test_fewer_frames_than_a_temporal_patch_are_refused(planner: PrefixPlanner) -> None:
    with pytest.raises(ServiceError, match="num_frames is 1") as caught:
        planner.plan(index_of(20), "sha", FrameSampling(num_frames=1), "")
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_an_hour_is_sampled_as_the_processor_does(planner: PrefixPlanner) -> None:
    index = index_of(108_000, fps=30.0, width=1280, height=720)
    plan = planner.plan(index, "sha", FrameSampling(num_frames=768), "")
    assert plan.patch_grid[0] == 384
    last = {"qwen3_vl": 107_999, "qwen2_5_vl": 107_859}  # evenly to the last frame, or by stride
    assert plan.frame_indices[-1] == last[plan.family]
