"""One layer's attention of a whole prefill on one rank."""

from __future__ import annotations

import numpy as np
import torch

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import AttentionReport, combine
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention_shape import PromptShape, dtype_name

SCALE = 0.3
PATCH = 50


def layer_shape(q: torch.Tensor, k: torch.Tensor) -> PromptShape:
    """The shape of one layer of [heads, tokens, head_dim] queries and keys on the CPU."""
    return PromptShape(
        num_layers=2,  # the last one does not attend
        num_tokens=k.shape[1],
        q_heads=len(q),
        kv_heads=len(k),
        head_dim=k.shape[-1],
        scale=SCALE,
        dtype=dtype_name(k.dtype),
        device=torch.device("cpu"),
    )


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    policy: AttentionPolicy,
    chunk: int = 300,
    from_tokens: int = 1,
    patch: int = PATCH,
    block: int = 64,
) -> tuple[torch.Tensor, AttentionReport]:
    """One layer of a prefill on one rank; the buffer is reordered on the way."""
    tokens = k.shape[1]
    ends = np.append(np.arange(patch, tokens, patch), tokens)
    settings = SparseSettings(from_tokens, block, segment_blocks=4)
    attention = AdaptiveAttention(settings, policy, layer_shape(q, k), ends)
    kv = torch.stack([k.transpose(0, 1), v.transpose(0, 1)], 1).contiguous()
    outs = []
    for start in range(0, tokens, chunk):
        part = q[:, start : start + chunk]
        if attention.is_sparse(start, part.shape[1]):
            outs.append(attention.attend_unit(0, part, kv, start=start))
        else:
            keys, values = kv[: start + part.shape[1]].permute(1, 2, 0, 3)
            outs.append(attend_causal(part, keys, values, q_offset=start, scale=SCALE).out)
            attention.observe_exact(0, part, kv, start=start)
    return torch.cat(outs, 1), combine([attention.stats.report()])


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()
