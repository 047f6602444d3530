"""A prefix's KV and greedy answers by transformers, in a process of its own.

Positions are the plan's (vLLM's formula), so Qwen2.5-VL is compared by vLLM's rule.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from prefill_service.kv.fingerprint import fingerprint_model
from prefill_service.models.prefix_plan import PrefixPlan
from tests.support.prepared_processes import prepared_processes

QUESTIONS = ("what is happening in the video?", "describe the end of it, please")


@dataclass
class Case:
    """A planned video with what transformers makes of it.

    Attributes:
        kv: [layers, 2, tokens, kv heads, head_dim] of the prefix.
        prompts: whole token ids per question.
        answers: greedy tokens per question.
        fingerprint: of the checkpoint.
    """

    plan: PrefixPlan
    kv: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]
    fingerprint: str


def compute(model: Path, frames: int, height: int, width: int, *, new_tokens: int) -> Case:
    """Build a case; the work is done in a fresh process, which then ends."""
    context = prepared_processes()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        fields = pool.submit(_compute, model, (frames, height, width), new_tokens).result()
        return Case(fields[0], torch.from_numpy(fields[1]), *fields[2:], fingerprint_model(model))


def _compute(
    model: Path, size: tuple[int, int, int], new_tokens: int
) -> tuple[PrefixPlan, np.ndarray, list[list[int]], list[list[int]]]:
    from prefill_service.models.checkpoint import open_checkpoint
    from prefill_service.models.family_registry import FAMILIES
    from prefill_service.models.prefix_plan import FrameSampling
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.video.geometry import Geometry
    from prefill_service.video.index import VideoIndex
    from tests.oracles.transformers_forward import cached_kv, load, prefix_cache, processor_inputs
    from tests.oracles.transformers_greedy import greedy

    torch.set_num_threads(1)
    frames, height, width = size
    index = VideoIndex(
        container="mp4",
        codec="h264",
        geometry=Geometry.square(width, height, frames),
        time_base=(1, 4),
        pts=np.arange(frames),
        keyframe=np.ones(frames, bool),
        times_s=np.arange(frames) / 4,
        fps=4.0,
        duration_s=frames / 4,
    )
    planner = PrefixPlanner(open_checkpoint(str(model)), "float32")
    _, processor = load(model, torch.float32)
    sampling = FrameSampling(num_frames=frames)
    if FAMILIES[planner.checkpoint.family].pixel_limits(processor.video_processor, sampling):
        # No less than the video has, whether a frame's pixels are limited or the whole video's.
        sampling = replace(sampling, min_pixels=1, max_pixels=frames * height * width)
    plan = planner.plan(index, f"{frames}x{height}x{width}", sampling, "")
    blocks = (len(plan.frame_indices), height // 32 + 1, width // 32 + 1, 3)
    colours = np.random.default_rng(0).integers(0, 256, blocks, np.uint8)
    video = colours.repeat(32, 1).repeat(32, 2)[:, :height, :width]
    inputs = processor_inputs(
        model,
        video,
        plan,
        index,
        text=planner.chat.prefix(""),
        size_kwargs=planner.sampler.size_kwargs(sampling),
    )
    assert inputs["input_ids"][0].tolist() == plan.token_ids.tolist()
    cache = prefix_cache(model, inputs, plan)
    prompts = []
    answers = []
    for question in QUESTIONS:
        prompt = planner.prompt_token_ids(plan, [("user", question)])
        prompts.append(prompt)
        answers.append(greedy(model, cache, prompt, plan, new_tokens=new_tokens))
    return plan, cached_kv(cache).numpy(), prompts, answers
