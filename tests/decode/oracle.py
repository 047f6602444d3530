"""A prefix's KV and greedy answers by transformers, in a process of its own.

Positions are the plan's (vLLM's formula), so Qwen2.5-VL is compared by the decoder's rule.
"""

from __future__ import annotations

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefill_service.models.plan import PrefixPlan

QUESTIONS = ("what is happening in the video?", "describe the end of it, please")


@dataclass
class Case:
    """A planned video with what transformers makes of it.

    Attributes:
        kv: [layers, 2, tokens, kv heads, head_dim] of the prefix.
        prompts: whole token ids per question.
        answers: greedy tokens per question.
    """

    plan: PrefixPlan
    kv: torch.Tensor
    prompts: list[list[int]]
    answers: list[list[int]]


def compute(model: Path, frames: int, height: int, width: int, new_tokens: int) -> Case:
    """Build a case; the work is done in a fresh process, which then ends."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        arguments = (model, frames, height, width, new_tokens)
        fields = pool.submit(_compute, *arguments).result()
        return Case(fields[0], torch.from_numpy(fields[1]), *fields[2:])


@torch.no_grad()
def _compute(
    model: Path, frames: int, height: int, width: int, new_tokens: int
) -> tuple[PrefixPlan, np.ndarray, list[list[int]], list[list[int]]]:
    from prefill_service.models.checkpoint import open_checkpoint
    from prefill_service.models.plan import FrameSampling
    from prefill_service.models.planner import PromptPlanner
    from prefill_service.video.index import VideoIndex
    from tests.oracles.transformers_forward import _load, processor_inputs

    torch.set_num_threads(1)
    index = VideoIndex(
        "mp4", "h264", width, height, 0, (1, 4), np.arange(frames), np.ones(frames, bool),
        4.0, frames / 4,
    )  # fmt: skip
    planner = PromptPlanner(open_checkpoint(str(model)), "float32")
    pixels = height * width
    sampling = FrameSampling(
        num_frames=frames,
        min_pixels=1,
        max_pixels=pixels * (frames if "qwen3" in str(model) else 1),
    )
    plan = planner.plan(index, f"{frames}x{height}x{width}", sampling, "")
    blocks = (len(plan.frame_indices), height // 32 + 1, width // 32 + 1, 3)
    colours = np.random.default_rng(0).integers(0, 256, blocks, np.uint8)
    video = colours.repeat(32, 1).repeat(32, 2)[:, :height, :width]
    network, processor = _load(model, torch.float32)
    processor.video_processor.size = {
        "shortest_edge": sampling.min_pixels, "longest_edge": sampling.max_pixels,
    }  # fmt: skip
    inputs = processor_inputs(model, video, plan, index, planner._prefix_text(""))
    assert inputs["input_ids"][0].tolist() == plan.token_ids.tolist()
    cache = _prefix_cache(network, inputs, plan)
    kv = torch.stack(
        [
            torch.stack([x[0].transpose(0, 1) for x in (layer.keys, layer.values)])
            for layer in cache.layers
        ]
    )
    prompts, answers = [], []
    for question in QUESTIONS:
        prompt = planner.prompt_token_ids(plan, [("user", question)])
        prompts.append(prompt)
        answers.append(_greedy(network, copy.deepcopy(cache), prompt, plan, new_tokens))
    return plan, kv.numpy(), prompts, answers


def _prefix_cache(network: Any, inputs: dict[str, Any], plan: PrefixPlan) -> Any:
    known = {k: v for k, v in inputs.items() if k not in ("second_per_grid_ts", "video_metadata")}
    positions = torch.from_numpy(plan.position_ids)[:, None]  # [3, 1, tokens]
    return network(**known, position_ids=positions, use_cache=True).past_key_values


def _greedy(
    network: Any, cache: Any, prompt: list[int], plan: PrefixPlan, new_tokens: int
) -> list[int]:
    tokens, start, answer = prompt[plan.num_tokens :], plan.num_tokens, []
    while len(answer) < new_tokens:
        positions = torch.arange(start, start + len(tokens)) + plan.position_delta
        output = network(
            input_ids=torch.tensor([tokens]),
            position_ids=positions.expand(3, 1, -1),
            past_key_values=cache,
            use_cache=True,
        )
        start += len(tokens)
        tokens = [int(output.logits[0, -1].argmax())]
        answer += tokens
        if tokens[0] == network.generation_config.eos_token_id:
            break
    return answer
