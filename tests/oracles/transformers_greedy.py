"""transformers' own greedy answers over a prefix, with vLLM's positions.

``generate`` itself cannot be used for Qwen2.5-VL: its positions after a long video differ from
vLLM's (``models.families.mrope``), so decoding goes token by token with the plan's positions. For
Qwen3-VL the two agree, and a test checks that this loop equals ``generate``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from prefill_service.models.prefix_plan import PrefixPlan
from tests.oracles.transformers_forward import load, model_positions


@torch.no_grad()
def greedy(
    model: Path, cache: Any, prompt: list[int], plan: PrefixPlan, *, new_tokens: int
) -> list[int]:
    """Answer ``prompt``, whose prefix is in ``cache``; ends at the end-of-sequence token."""
    network, _ = load(model, torch.float32)
    cache = copy.deepcopy(cache)
    tokens = prompt[plan.num_tokens :]
    start = plan.num_tokens
    answer: list[int] = []
    while len(answer) < new_tokens:
        positions = torch.arange(start, start + len(tokens)) + plan.position_delta
        output = network(
            input_ids=torch.tensor([tokens]),
            position_ids=model_positions(plan, positions.expand(len(plan.position_ids), -1)),
            past_key_values=cache,
            use_cache=True,
        )
        start += len(tokens)
        tokens = [int(output.logits[0, -1].argmax())]
        answer += tokens
        if tokens[0] == network.generation_config.eos_token_id:
            break
    return answer


@torch.no_grad()
def generate(model: Path, inputs: dict[str, Any], new_tokens: int) -> list[int]:
    """transformers' ``generate`` on a whole prompt; ``inputs`` are ``processor_inputs``."""
    network, _ = load(model, torch.float32)
    known = {k: v for k, v in inputs.items() if k != "video_metadata"}
    output = network.generate(**known, max_new_tokens=new_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()
