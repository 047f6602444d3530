"""The certificate: a few query rows attended exactly, and what the approximation made of them.

The kept mass of a row is ``sum_i min(p_i, p~_i) = 1 - TV(p, p~)``, p being the exact attention
distribution over its keys and p~ the one that was used: exact probabilities for tokens of kept
blocks and of the local region, and for a block known by its summary the summary's probability,
spread evenly over the block's tokens. Where dropped blocks get nothing this is the exact mass of
the kept blocks, the usual measure. It bounds the output's error: ``|o - o~|`` is at most
``2 (1 - kept mass) max |v|``. A row whose output is not a number keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prefill_kernels.cpu.matmul import product
from torch import Tensor

from prefill_service.attention.sparse.attend import SparseResult
from prefill_service.attention.sparse.cpu_backend import GatherBuffers
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles

_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Probabilities held at once: with a million keys even a few rows of all heads are gigabytes."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Measurements of sampled rows.

    Attributes:
        kept_mass, output_error: [kv_heads, group, samples].
        weighted: [kv_heads, keys] exact probabilities times the caller's weights, summed over the
            rows; [kv_heads, 0] without weights.
    """

    kept_mass: Tensor
    output_error: Tensor
    weighted: Tensor


def exact_rows(
    q: Tensor, k: Tensor, position: Tensor, q_offset: int, scale: float, buffers: GatherBuffers
) -> tuple[Tensor, Tensor]:
    """Dense attention probabilities of a few rows of one KV head.

    Args:
        q: [group, samples, head_dim].
        k: [keys, head_dim], in any order up to the first sampled tile.
        position: [samples] of the queries.
        q_offset: position that no query is before.

    Returns:
        Probabilities [group * samples, keys], 0 where hidden, and the scores' natural log-sum-exp
        [group * samples]; float32 (or float64). The probabilities live in ``buffers``.
    """
    rows = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32).flatten(0, 1)
    p = buffers.get("probabilities", (len(rows), len(k)), rows)
    scores = product(rows * scale, k.to(rows.dtype))
    hidden = torch.arange(q_offset, len(k), device=q.device) > position[:, None]
    scores[:, q_offset:].masked_fill_(hidden.repeat(len(q), 1), -torch.inf)
    torch.softmax(scores, -1, out=p)
    return p, scores.amax(-1) - p.amax(-1).log()  # cheaper than another sum of exponentials


def visible_mass(p: Tensor, weights: Tensor) -> Tensor:
    """[keys]: [group * samples, keys] probabilities times [samples, keys] weights, summed."""
    return (p.view(-1, *weights.shape).sum(0) * weights.to(p.dtype)).sum(0)


def certify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    used: SparseResult,
    summaries: BlockSummaries,
    tiles: Tiles,
    sampled: Tensor,
    weights: Tensor | None,
    scale: float,
    buffers: GatherBuffers,
) -> Certificate:
    """Measure the rows ``sampled`` of a sparse attention.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, tiles.keys, head_dim].
        used: what is measured.
        sampled: [samples] queries, on any device.
        weights: [samples, keys] for ``Certificate.weighted``.
    """
    run = _Measured(q, k, v, used, summaries.first(tiles.blocks), tiles, scale, buffers)
    per_sample = len(q) // len(k) * tiles.keys
    size = max(1, _AT_ONCE[q.device.type] // per_sample)
    strips = [slice(start, start + size) for start in range(0, len(sampled), size)]
    measured = [run.strip(sampled[s], None if weights is None else weights[s]) for s in strips]
    kept, errors, masses = zip(*measured, strict=True)
    return Certificate(torch.cat(kept, 2), torch.cat(errors, 2), torch.stack(masses).sum(0))


@dataclass(frozen=True, slots=True)
class _Measured:
    """The inputs of one ``certify``."""

    q: Tensor
    k: Tensor
    v: Tensor
    used: SparseResult
    summaries: BlockSummaries
    tiles: Tiles
    scale: float
    buffers: GatherBuffers

    def strip(self, sampled: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Kept mass and output error [kv_heads, group, samples], weighted mass [kv_heads, keys]."""
        group, tiles, device = len(self.q) // len(self.k), self.tiles, self.q.device
        tile = sampled // tiles.tile_tokens
        seen = torch.tensor([tiles.candidates(i) for i in tile.tolist()], device=device)
        # A block that the row's tile has no candidate for is part of the local region.
        local = torch.arange(tiles.blocks, device=device) >= seen[:, None]  # [samples, blocks]
        rows, tile = sampled.to(device), tile.to(device)
        measured = []
        for head in range(len(self.k)):
            mine = slice(head * group, (head + 1) * group)
            q, out, lse = self.q[mine, rows], self.used.out[mine, rows], self.used.lse[mine, rows]
            p, exact_lse = exact_rows(
                q, self.k[head], tiles.q_offset + rows, tiles.q_offset, self.scale, self.buffers
            )
            out, lse = out.to(p.dtype), lse.to(p.dtype)
            # Of tokens that were attended p~ is p times this, as their scores are the same.
            ratio = torch.exp(exact_lse.view_as(lse) - lse).clamp(max=1)
            logit = (q.to(p.dtype) * self.scale) @ self.summaries.k_mean[head].to(p.dtype).T
            logit = logit + self.used.bias[head, tile] - lse[..., None]  # [group, samples, blocks]
            kept = self._kept_mass(p, ratio, logit, self.used.keep[head, tile] | local)
            exact = product(p, self.v[head].to(p.dtype).T).view_as(out)
            error = (out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
            # What is not a number has no certificate: an infinite LSE would make p~ anything.
            sound = finite_rows(out) & lse.isfinite() & error.isfinite()
            kept, error = torch.where(sound, kept, 0.0), torch.where(sound, error, 1.0)
            mass = p.new_empty(0) if weights is None else visible_mass(p, weights)
            measured.append((kept, error, mass))
        kepts, errors, masses = (torch.stack(part) for part in zip(*measured, strict=True))
        return kepts, errors, masses

    def _kept_mass(self, p: Tensor, ratio: Tensor, logit: Tensor, whole: Tensor) -> Tensor:
        """[group, samples] of min(p, p~), summed over the keys.

        Args:
            p: [group * samples, keys].
            ratio: [group, samples] of p~ to p where tokens were attended, at most 1.
            logit: [group, samples, blocks] log of p~ of the summaries.
            whole: [samples, blocks] bool, blocks whose tokens were attended.
        """
        end = self.tiles.blocks * self.tiles.block_tokens
        kept = ratio * p[:, end:].sum(-1).view_as(ratio)
        if not self.tiles.blocks:
            return kept
        spread = (logit.exp() / self.tiles.block_tokens).masked_fill(whole, torch.inf)
        least = self.buffers.get("scores", (len(p), end), p).view(*logit.shape, -1)
        torch.minimum(p[:, :end].view_as(least), spread[..., None], out=least)
        of_block = least.sum(-1)
        return kept + torch.where(whole, of_block * ratio[..., None], of_block).sum(-1)


def finite_rows(out: Tensor) -> Tensor:
    """[...] bool: whether all of [..., head_dim] are numbers."""
    return out.isfinite().all(-1)
