"""The certificate: a few query rows attended exactly, and what the approximation made of them.

The kept mass of a row is ``sum_i min(p_i, p~_i) = 1 - TV(p, p~)``, p being the exact attention
distribution over its keys and p~ the one that was used: exact probabilities for tokens of kept
blocks and of the local region, and for a block known by its summary the summary's probability,
spread evenly over the block's tokens. Where dropped blocks get nothing this is the exact mass of
the kept blocks, the usual measure. It bounds the output's error: ``|o - o~|`` is at most
``2 (1 - kept mass) max |v|``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefill_service.attention.sparse import SparseResult
from prefill_service.attention.summaries import BlockSummaries
from prefill_service.attention.tiles import Tiles


@dataclass(frozen=True, slots=True)
class Certificate:
    """Measurements of sampled rows.

    Attributes:
        kept_mass, output_error: [kv_heads, group * samples].
        weighted: [kv_heads, keys] exact probabilities times the caller's weights, summed over the
            rows.
    """

    kept_mass: Tensor
    output_error: Tensor
    weighted: Tensor


def sample_rows(queries: int, samples: int, seed: int) -> Tensor:
    """Which queries to look at: evenly spaced, shifted by ``seed``, so that chunks differ.

    Returns:
        [min(samples, queries)] int64, ascending and distinct.
    """
    samples = min(samples, queries)
    shift = (seed * 0.6180339887) % 1  # the golden ratio leaves no stretch unvisited
    return ((torch.arange(samples) + shift) * (queries / samples)).long()


def exact_rows(q: Tensor, k: Tensor, position: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention probabilities of a few rows of one KV head.

    Args:
        q: [group, samples, head_dim].
        k: [keys, head_dim], in any order up to the first sampled tile.
        position: [samples] of the queries.

    Returns:
        Scores [group * samples, keys], -inf where hidden, and their softmax; float32 (or float64).
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    hidden = torch.arange(len(k), device=q.device) > position[:, None]  # [samples, keys]
    scores = (q.to(work).flatten(0, 1) * scale) @ k.to(work).T
    scores.masked_fill_(hidden.repeat(len(q), 1), -torch.inf)
    return scores, torch.softmax(scores, -1)


def visible_mass(p: Tensor, weights: Tensor) -> Tensor:
    """[keys]: [group * samples, keys] probabilities times [samples, keys] weights, summed."""
    return (p.view(-1, *weights.shape) * weights.to(p.dtype)).sum((0, 1))


def certify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: SparseResult,
    summaries: BlockSummaries,
    tiles: Tiles,
    sampled: Tensor,
    weights: Tensor,
    scale: float,
) -> Certificate:
    """Measure the rows ``sampled`` of a sparse attention.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, tiles.keys, head_dim].
        used: what is measured.
        sampled: [samples] queries, on any device.
        weights: [samples, keys] for ``Certificate.weighted``.
    """
    group = len(q) // len(k)
    seen = [tiles.candidates(int(i) // tiles.tile_tokens) for i in sampled] * group
    # A block that the row's tile has no candidate for is part of the local region.
    block = torch.arange(tiles.blocks, device=q.device)
    local = block >= torch.tensor(seen, device=q.device)[:, None]  # [group * samples, blocks]
    sampled = sampled.to(q.device)
    tile, position = (sampled // tiles.tile_tokens).repeat(group), tiles.q_offset + sampled
    measured = []
    # One head at a time: with a million keys even a few rows of all heads are gigabytes.
    for head in range(len(k)):
        mine = slice(head * group, (head + 1) * group)
        scores, p = exact_rows(q[mine, sampled], k[head], position, scale)
        log_norm = used.lse[mine, sampled].to(p.dtype).view(-1, 1)
        taken = scores.sub_(log_norm).exp_()  # [group * samples, keys]
        if tiles.blocks:
            rows = q[mine, sampled].to(p.dtype).flatten(0, 1) * scale
            means = summaries.k_mean[head, : tiles.blocks].to(p.dtype)
            logit = rows @ means.T + used.bias[head, tile] - log_norm
            spread = (logit.exp() / tiles.block_tokens)[..., None]  # 0 for kept blocks
            far = taken[:, : tiles.blocks * tiles.block_tokens]
            far = far.view(len(rows), tiles.blocks, tiles.block_tokens)
            far.copy_(torch.where((used.keep[head, tile] | local)[..., None], far, spread))
        exact = p @ v[head].to(p.dtype)
        error = used.out[mine, sampled].to(p.dtype).flatten(0, 1) - exact
        error = error.norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
        measured.append((torch.minimum(p, taken).sum(-1), error, visible_mass(p, weights)))
    kept, errors, masses = (torch.stack(part) for part in zip(*measured, strict=True))
    # What is not a number has no certificate.
    return Certificate(kept.nan_to_num(0.0), errors.nan_to_num(1.0), masses)
