"""Sparse attention with summaries in float64, token by token, without any of the product's code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def causal_scores(q: Tensor, k: Tensor, q_offset: int, scale: float) -> Tensor:
    """[q_heads, queries, keys] float64, -inf where a key comes after the query."""
    group = len(q) // len(k)
    scores = q.double() @ k.double().repeat_interleave(group, 0).mT * scale
    position = q_offset + torch.arange(q.shape[1])
    return scores.masked_fill(torch.arange(k.shape[1]) > position[:, None], -torch.inf)


def dense(q: Tensor, k: Tensor, v: Tensor, q_offset: int, scale: float) -> Tensor:
    group = len(q) // len(k)
    p = causal_scores(q, k, q_offset, scale).softmax(-1)
    return p @ v.double().repeat_interleave(group, 0)


def used_distribution(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    keep: Tensor,
    bias: Tensor,
    known: BlockSummaries,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Probabilities of tokens [q_heads, queries, keys] and of summaries [.., blocks], float64."""
    group = len(q) // len(k)
    block = tiles.block_tokens
    scores = causal_scores(q, k, tiles.q_offset, scale)
    summary = q.double() @ known.k_mean.double().repeat_interleave(group, 0).mT * scale
    for tile in range(tiles.count):
        rows = slice(tile * tiles.tile_tokens, (tile + 1) * tiles.tile_tokens)
        for head in range(len(q)):
            kept = keep[head // group, tile].repeat_interleave(block)
            kept[tiles.local_start(tile) :] = True
            scores[head, rows, : len(kept)].masked_fill_(~kept, -torch.inf)
            summary[head, rows] += bias[head // group, tile].double()
    both = torch.cat([scores, summary], -1).softmax(-1)
    return both[..., : scores.shape[-1]], both[..., scores.shape[-1] :]


def used_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    keep: Tensor,
    bias: Tensor,
    known: BlockSummaries,
    scale: float,
) -> Tensor:
    group = len(q) // len(k)
    tokens, blocks = used_distribution(q, k, tiles, keep, bias, known, scale)
    means = known.v_mean.double().repeat_interleave(group, 0)
    return tokens @ v.double().repeat_interleave(group, 0) + blocks @ means


def kept_mass(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    keep: Tensor,
    bias: Tensor,
    known: BlockSummaries,
    scale: float,
) -> Tensor:
    """[q_heads, queries]: 1 - total variation distance between exact and used."""
    exact = causal_scores(q, k, tiles.q_offset, scale).softmax(-1)
    tokens, blocks = used_distribution(q, k, tiles, keep, bias, known, scale)
    spread = (blocks / tiles.block_tokens).repeat_interleave(tiles.block_tokens, -1)
    tokens[..., : spread.shape[-1]] += spread
    return torch.minimum(exact, tokens).sum(-1)


def log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(-1) - math.log(x.shape[-1])
