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

from prefill_service.attention.summaries import BlockSummaries
from prefill_service.attention.tiles import Tiles


@dataclass(frozen=True, slots=True)
class Certificate:
    """Measurements of sampled rows.

    Attributes:
        kept_mass, output_error: [kv_heads, group * samples].
        exact: [kv_heads, group * samples, keys] exact attention probabilities.
    """

    kept_mass: Tensor
    output_error: Tensor
    exact: Tensor


def sample_rows(queries: int, samples: int, seed: int) -> Tensor:
    """Which queries to look at: evenly spaced, shifted by ``seed``, so that chunks differ.

    Returns:
        [min(samples, queries)] int64, ascending and distinct.
    """
    samples = min(samples, queries)
    shift = (seed * 0.6180339887) % 1  # the golden ratio leaves no stretch unvisited
    return ((torch.arange(samples) + shift) * (queries / samples)).long()


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention of a few rows.

    Args:
        q: [q_heads, samples, head_dim].
        k, v: [kv_heads, keys, head_dim], in any order up to the first sampled tile.
        position: [samples] of the queries.

    Returns:
        Scores [kv_heads, group * samples, keys] (-inf where hidden), their softmax, and the
        output [kv_heads, group * samples, head_dim], all float32 (or float64).
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_heads, _, head_dim = q.shape
    kv_heads, keys, _ = k.shape
    rows = q.to(work).reshape(kv_heads, -1, head_dim) * scale
    hidden = torch.arange(keys, device=q.device) > position[:, None]  # [samples, keys]
    hidden = hidden.repeat(q_heads // kv_heads, 1)
    # One head at a time: widening all of a half-precision K and V would double the KV memory.
    scores = torch.stack([rows[h] @ k[h].to(work).T for h in range(kv_heads)])
    p = torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)
    return scores, p, torch.stack([p[h] @ v[h].to(work) for h in range(kv_heads)])


def certify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keep: Tensor,
    bias: Tensor,
    summaries: BlockSummaries,
    tiles: Tiles,
    sampled: Tensor,
    scale: float,
) -> Certificate:
    """Measure the rows ``sampled`` of a sparse attention.

    Args:
        q, out: [q_heads, queries, head_dim].
        lse: [q_heads, queries].
        k, v: [kv_heads, tiles.keys, head_dim].
        keep, bias: [kv_heads, tiles, blocks] of ``SparseResult``.
        sampled: [samples] queries, on any device.
    """
    kv_heads, block = len(k), tiles.block_tokens
    group = len(q) // kv_heads
    seen = [tiles.candidates(int(i) // tiles.tile_tokens) for i in sampled] * group
    sampled = sampled.to(q.device)
    scores, p, exact = exact_rows(q[:, sampled], k, v, tiles.q_offset + sampled, scale)
    used = out[:, sampled].to(exact.dtype).reshape(exact.shape)
    log_norm = lse[:, sampled].to(exact.dtype).reshape(*exact.shape[:2], 1)
    tile = (sampled // tiles.tile_tokens).repeat(group)  # [group * samples]
    approximate = torch.exp(scores - log_norm)
    end = tiles.blocks * block
    if end:
        rows = q[:, sampled].to(exact.dtype).reshape(kv_heads, -1, q.shape[-1]) * scale
        means = summaries.first(tiles.blocks).k_mean.to(exact.dtype)
        logit = rows @ means.transpose(1, 2) + bias[:, tile] - log_norm
        spread = (logit.exp() / block)[..., None]  # [kv_heads, rows, blocks, 1], 0 if kept
        far = approximate[..., :end].view(*exact.shape[:2], tiles.blocks, block)
        # A block that the row's tile has no candidate for is part of the local region.
        count = torch.tensor(seen, device=q.device)
        local = torch.arange(tiles.blocks, device=q.device) >= count[:, None]
        far.copy_(torch.where((keep[:, tile] | local)[..., None], far, spread))
    kept_mass = torch.minimum(p, approximate).sum(-1)
    error = (used - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
    # What is not a number has no certificate.
    return Certificate(kept_mass.nan_to_num(0.0), error.nan_to_num(1.0), p)
