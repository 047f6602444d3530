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
from prefill_kernels.cpu.matmul import matmul_nt
from torch import Tensor

from prefill_service.attention.sparse.problem import SparseProblem, SparseResult, by_kv_head
from prefill_service.attention.sparse.scratch import ScratchBuffers

_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}
"""Probabilities held at once: with a million keys even a few rows of all heads are gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Measurements of sampled rows.

    Attributes:
        kept_mass, output_error: [kv_heads, queries_per_kv, samples].
        weighted: [kv_heads, keys] exact probabilities times the caller's weights, summed over the
            rows; [kv_heads, 0] without weights.
    """

    kept_mass: Tensor
    output_error: Tensor
    weighted: Tensor


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Queries that are attended exactly as well.

    Attributes:
        rows: [samples] numbers of the queries, on any device.
        weights: [samples, keys] for ``Certificate.weighted``, or nothing.
    """

    rows: Tensor
    weights: Tensor | None = None


def exact_rows(
    q: Tensor, k: Tensor, *, position: Tensor, q_offset: int, scale: float, scratch: ScratchBuffers
) -> tuple[Tensor, Tensor]:
    """Dense attention probabilities of a few rows of one KV head.

    Args:
        q: [queries_per_kv, samples, head_dim].
        k: [keys, head_dim], in any order up to the first sampled tile.
        position: [samples] of the queries.
        q_offset: position that no query is before.
        scale: factor on the scores.
        scratch: where the probabilities are written.

    Returns:
        Probabilities [queries_per_kv * samples, keys], 0 where hidden, and the scores' natural
        log-sum-exp [queries_per_kv * samples]; float32 (or float64).
    """
    rows = q.to(torch.float64 if q.dtype == torch.float64 else torch.float32).flatten(0, 1)
    p = scratch.get("probabilities", (len(rows), len(k)), rows)
    scores = matmul_nt(rows * scale, k.to(rows.dtype))
    hidden = torch.arange(q_offset, len(k), device=q.device) > position[:, None]
    scores[:, q_offset:].masked_fill_(hidden.repeat(len(q), 1), -torch.inf)
    torch.softmax(scores, -1, out=p)
    return p, scores.amax(-1) - p.amax(-1).log()  # cheaper than another sum of exponentials


def visible_mass(p: Tensor, weights: Tensor) -> Tensor:
    """[keys]: [queries_per_kv * samples, keys] probabilities times [samples, keys], summed."""
    return (p.view(-1, *weights.shape).sum(0) * weights.to(p.dtype)).sum(0)


def verify_rows(
    problem: SparseProblem, result: SparseResult, sampled: SampledRows, scratch: ScratchBuffers
) -> Certificate:
    """Attend to the sampled rows exactly, and measure what ``result`` made of them."""
    measured = _Measured(problem, result, scratch)
    rows, weights = sampled.rows, sampled.weights
    per_sample = len(problem.q) // len(problem.k) * problem.tiles.keys
    size = max(1, _AT_ONCE[problem.q.device.type] // per_sample)
    strips = [slice(start, start + size) for start in range(0, len(rows), size)]
    parts = [measured.strip(rows[s], None if weights is None else weights[s]) for s in strips]
    kept, errors, masses = zip(*parts, strict=True)
    return Certificate(
        kept_mass=torch.cat(kept, 2),
        output_error=torch.cat(errors, 2),
        weighted=torch.stack(masses).sum(0),
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a ``verify_rows`` compares."""

    problem: SparseProblem
    result: SparseResult
    scratch: ScratchBuffers

    def strip(self, sampled: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Kept mass and output error [kv_heads, queries_per_kv, samples], and weighted mass.

        The weighted mass is [kv_heads, keys].
        """
        problem, result, tiles = self.problem, self.result, self.problem.tiles
        kv_heads, device = len(problem.k), problem.q.device
        tile = sampled // tiles.tile_tokens
        visible = torch.tensor([tiles.candidates(i) for i in tile.tolist()], device=device)
        # A block that the row's tile has no candidate for is part of the local region.
        local = torch.arange(tiles.blocks, device=device) >= visible[:, None]  # [samples, blocks]
        rows, tile = sampled.to(device), tile.to(device)
        k_mean = problem.summaries.first(tiles.blocks).k_mean
        measured = []
        for head in range(kv_heads):
            q, out, lse = (
                by_kv_head(x, kv_heads)[head][:, rows] for x in (problem.q, result.out, result.lse)
            )
            p, exact_lse = exact_rows(
                q,
                problem.k[head],
                position=tiles.q_offset + rows,
                q_offset=tiles.q_offset,
                scale=problem.scale,
                scratch=self.scratch,
            )
            out, lse = out.to(p.dtype), lse.to(p.dtype)
            # Of tokens that were attended p~ is p times this, as their scores are the same.
            ratio = torch.exp(exact_lse.view_as(lse) - lse).clamp(max=1)
            logit = (q.to(p.dtype) * problem.scale) @ k_mean[head].to(p.dtype).T
            logit = logit + result.bias[head, tile] - lse[..., None]  # [group, samples, blocks]
            kept = self._kept_mass(p, ratio, logit, result.keep[head, tile] | local)
            exact = matmul_nt(p, problem.v[head].to(p.dtype).T).view_as(out)
            error = (out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
            # What is not a number is not verified: an infinite LSE would make p~ anything.
            sound = finite_rows(out) & lse.isfinite() & error.isfinite()
            kept, error = torch.where(sound, kept, 0.0), torch.where(sound, error, 1.0)
            mass = p.new_empty(0) if weights is None else visible_mass(p, weights)
            measured.append((kept, error, mass))
        kepts, errors, masses = (torch.stack(part) for part in zip(*measured, strict=True))
        return kepts, errors, masses

    def _kept_mass(self, p: Tensor, ratio: Tensor, logit: Tensor, whole: Tensor) -> Tensor:
        """[queries_per_kv, samples] of min(p, p~), summed over the keys.

        Args:
            p: [queries_per_kv * samples, keys].
            ratio: [queries_per_kv, samples] of p~ to p where tokens were attended, at most 1.
            logit: [queries_per_kv, samples, blocks] log of p~ of the summaries.
            whole: [samples, blocks] bool, blocks whose tokens were attended.
        """
        tiles = self.problem.tiles
        end = tiles.blocks * tiles.block_tokens
        kept = ratio * p[:, end:].sum(-1).view_as(ratio)
        if not tiles.blocks:
            return kept
        spread = (logit.exp() / tiles.block_tokens).masked_fill(whole, torch.inf)
        least = self.scratch.get("smaller masses", (len(p), end), p).view(*logit.shape, -1)
        torch.minimum(p[:, :end].view_as(least), spread[..., None], out=least)
        of_block = least.sum(-1)
        return kept + torch.where(whole, of_block * ratio[..., None], of_block).sum(-1)


def finite_rows(out: Tensor) -> Tensor:
    """[...] bool: whether all of [..., head_dim] are numbers."""
    return out.isfinite().all(-1)
