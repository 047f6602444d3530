"""Blocks of keys that are alike: the order in which a past segment's keys are stored.

Video tokens in raster order put unlike keys side by side (a timestamp, sky, a hand), so that a
block's mean says little about its members. Keys that no query precedes any more may be stored in
any order: attention over them is a sum. Each KV head's keys of such a segment are split in two
equal halves along the direction in which they differ most, again and again down to blocks: a
balanced principal-direction k-d tree (Sproull 1991; the segment-wise permutation of PBS-Attn,
arXiv 2510.21270, has the same licence, with another order).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from prefill_service.attention_shape import accumulation_dtype

_POWER_STEPS = 2


def cluster_order(keys: Tensor, block_tokens: int) -> Tensor:
    """Order that makes every run of ``block_tokens`` keys alike.

    Args:
        keys: [..., segment, head_dim], any float dtype; each leading index is ordered by itself.
        block_tokens: tokens per block; the segment is this times a power of two.

    Returns:
        [..., segment] int64, a permutation of the segment's positions.

    Raises:
        ValueError: a segment that is no power-of-two multiple of the block.
    """
    segment, head_dim = keys.shape[-2:]
    halvings = (segment // block_tokens).bit_length() - 1
    if block_tokens << max(halvings, 0) != segment:
        raise ValueError(
            f"a segment of {segment} tokens is no power-of-two multiple of a block of "
            f"{block_tokens}"
        )
    work = accumulation_dtype(keys.dtype)
    x = keys.to(work).reshape(-1, segment, head_dim).contiguous()
    norm = x.square().sum(-1)  # [nodes, size], squared
    order = torch.arange(segment, device=keys.device).expand(x.shape[:2])
    for level in range(halvings):
        rank = _along_principal_direction(x, norm).argsort(dim=1, stable=True)  # [nodes, size]
        half = (len(rank) << 1, rank.shape[1] >> 1)
        order = order.gather(1, rank).view(half)
        if level < halvings - 1:
            node = torch.arange(len(rank), device=rank.device)[:, None] * rank.shape[1]
            x = x.view(-1, head_dim).index_select(0, (rank + node).view(-1))
            x = x.view(*half, head_dim)
            norm = norm.gather(1, rank).view(half)
    return order.reshape(keys.shape[:-1])


def order_segments(
    keys: Tensor, block_tokens: int, segment_tokens: int, fixed_tokens: int = 0
) -> Tensor:
    """Clustered order of whole segments; the first tokens may have to stay where they are.

    Args:
        keys: [kv_heads, tokens, head_dim], tokens a multiple of ``segment_tokens``.
        block_tokens, segment_tokens: see ``cluster_order``.
        fixed_tokens: at most a segment. The blocks that hold them keep their tokens; the rest of
            the first segment is clustered in runs that double in length.

    Returns:
        [kv_heads, tokens] int64, a permutation of the positions.
    """
    edges = [segment_tokens if fixed_tokens else 0]
    while edges[0] // 2 >= max(fixed_tokens, block_tokens):
        edges.insert(0, edges[0] // 2)
    parts = [torch.arange(edges[0], device=keys.device).expand(len(keys), -1)]
    parts += [cluster_order(keys[:, a:b], block_tokens) + a for a, b in pairwise(edges)]
    starts = torch.arange(edges[-1], keys.shape[1], segment_tokens, device=keys.device)
    if len(starts):
        segments = keys[:, edges[-1] :].view(len(keys), -1, segment_tokens, keys.shape[-1])
        parts.append((cluster_order(segments, block_tokens) + starts[:, None]).flatten(1))
    return torch.cat(parts, 1)


def _along_principal_direction(x: Tensor, norm: Tensor) -> Tensor:
    """[nodes, size, head_dim] to the [nodes, size] coordinates along each node's widest spread.

    Power iteration without forming the covariance, from the key farthest from the mean: two steps
    split as well as an eigenvector does, and a lone outlier ends up at the end of the order.
    ``norm`` are the keys' squared norms. Nothing is centred but the coordinates: ``x^T c`` of
    centred coordinates ``c`` is the same for centred and uncentred keys.
    """
    mean = x.mean(1, keepdim=True)  # [nodes, 1, head_dim]
    distance = norm - 2 * (x @ mean.transpose(1, 2)).squeeze(-1)  # plus a constant per node
    farthest = distance.argmax(1)[:, None, None].expand(-1, 1, x.shape[-1])
    direction = x.gather(1, farthest) - mean
    for _ in range(_POWER_STEPS):
        along = x @ direction.transpose(1, 2)  # [nodes, size, 1]
        direction = (along - along.mean(1, keepdim=True)).transpose(1, 2) @ x
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return (x @ direction.transpose(1, 2)).squeeze(-1)
