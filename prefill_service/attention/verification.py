"""Verification: a few query rows attended exactly, and what the approximation made of them.

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

from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult, by_kv_head
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import accumulation_dtype

_MIN_SAMPLES = 2
_MAX_SAMPLES = 8  # where a chunk has more tiles, one row of each is verified
_VERIFIED_EVERY = 64
_OBSERVED_EVERY = 256

_ONE_A_TILE_FROM = 8192
"""Keys from which one row of each tile is verified: a row costs as much as all keys, and prompts
of that length have many chunks to look at."""

_RECHECK_FACTOR = 3
"""Before anything is computed again, so many times as many rows are verified."""

_PROBABILITIES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}
"""With a million keys even the probabilities of a few rows of all heads are gigabytes."""

_GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Queries that are attended exactly as well.

    Attributes:
        rows: [samples] numbers of the queries, on any device.
        weights: [samples, keys] for ``Verification.weighted``, or nothing.
    """

    rows: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Measurements of sampled rows.

    Attributes:
        kept_mass, output_error: [kv_heads, queries_per_kv, samples].
        weighted: [kv_heads, keys] exact probabilities times the caller's weights, summed over the
            rows; [kv_heads, 0] without weights.
    """

    kept_mass: Tensor
    output_error: Tensor
    weighted: Tensor


def choose_rows(settings: SparseSettings, tiles: Tiles, layer: int) -> tuple[Tensor, Tensor]:
    """Which queries are verified: some of every tile, others in each layer and chunk.

    Returns:
        Their numbers, and those of the queries that are verified where these miss the floor.
    """
    if settings.verify_every_row:
        rows = torch.arange(tiles.queries)
        return rows, rows  # no other row could add to these
    few = max(_MIN_SAMPLES, min(_MAX_SAMPLES, tiles.queries // _VERIFIED_EVERY))
    if tiles.keys >= _ONE_A_TILE_FROM:
        few = max(_MIN_SAMPLES, min(few, tiles.count))
    wanted = min(settings.verified_rows, tiles.queries) or few
    per_tile = -(-wanted // tiles.count)
    seed = _seed(tiles, layer)
    recheck = sample_tiles(tiles, _RECHECK_FACTOR * per_tile, seed + tiles.count)
    return sample_tiles(tiles, per_tile, seed), recheck


def choose_observed_rows(tiles: Tiles, layer: int) -> Tensor:
    """Which queries of exact attention are sampled for the mass that patches get."""
    samples = max(_MIN_SAMPLES, min(_MAX_SAMPLES, tiles.queries // _OBSERVED_EVERY))
    return sample_rows(tiles.queries, samples, _seed(tiles, layer))


def sample_rows(queries: int, samples: int, seed: int) -> Tensor:
    """Evenly spaced numbers of queries, shifted by ``seed``, so that chunks differ.

    Returns:
        [min(samples, queries)] int64, ascending and distinct.
    """
    samples = min(samples, queries)
    shift = (seed * _GOLDEN_RATIO) % 1  # which leaves no stretch unvisited
    return ((torch.arange(samples) + shift) * (queries / samples)).long()


def sample_tiles(tiles: Tiles, per_tile: int, seed: int) -> Tensor:
    """The same for every tile by itself, so that none is left out; each has its own shift.

    Returns:
        [samples] int64, ascending and distinct.
    """
    of_tile = [
        tile * tiles.tile_tokens + sample_rows(tiles.tokens(tile), per_tile, seed + tile)
        for tile in range(tiles.count)
    ]
    return torch.cat(of_tile)


def _seed(tiles: Tiles, layer: int) -> int:
    return tiles.q_offset // tiles.tile_tokens + 7 * layer


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
    rows = q.to(accumulation_dtype(q.dtype)).flatten(0, 1)
    p = scratch.get("probabilities", (len(rows), len(k)), rows)
    scores = matmul_nt(rows * scale, k.to(rows.dtype))
    hidden = torch.arange(q_offset, len(k), device=q.device) > position[:, None]
    scores[:, q_offset:].masked_fill_(hidden.repeat(len(q), 1), -torch.inf)
    torch.softmax(scores, -1, out=p)
    return p, scores.amax(-1) - p.amax(-1).log()  # cheaper than another sum of exponentials


def weigh_values(p: Tensor, v: Tensor) -> Tensor:
    """[rows, head_dim]: [rows, keys] probabilities times [keys, head_dim] values.

    A value that is not finite makes NaN of the rows that have a weight for it, and of no other.
    """
    out = matmul_nt(p, v.T)
    if out.isfinite().all():
        return out
    broken = ~v.isfinite()
    seen = (p > 0).to(p.dtype) @ broken.to(p.dtype) > 0
    return matmul_nt(p, v.masked_fill(broken, 0.0).T).masked_fill_(seen, torch.nan)


def visible_mass(p: Tensor, weights: Tensor) -> Tensor:
    """[keys]: [queries_per_kv * samples, keys] probabilities times [samples, keys], summed."""
    return (p.view(-1, *weights.shape).sum(0) * weights.to(p.dtype)).sum(0)


def verify_rows(
    problem: SparseProblem, result: SparseResult, sampled: SampledRows, scratch: ScratchBuffers
) -> Verification:
    """Attend to the sampled rows exactly, and measure what ``result`` made of them."""
    comparison = _Comparison(problem, result, scratch)
    rows = sampled.rows
    weights = sampled.weights
    per_sample = len(problem.q) // len(problem.k) * problem.tiles.keys
    size = max(1, _PROBABILITIES_AT_ONCE[problem.q.device.type] // per_sample)
    strips = [slice(start, start + size) for start in range(0, len(rows), size)]
    parts = [comparison.strip(rows[s], None if weights is None else weights[s]) for s in strips]
    return Verification(
        kept_mass=torch.cat([part.kept_mass for part in parts], 2),
        output_error=torch.cat([part.output_error for part in parts], 2),
        weighted=torch.stack([part.weighted for part in parts]).sum(0),
    )


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A sparse attention, to be compared with exact attention of some of its rows."""

    problem: SparseProblem
    result: SparseResult
    scratch: ScratchBuffers

    def strip(self, sampled: Tensor, weights: Tensor | None) -> Verification:
        """Verify as many rows as fit into memory at once."""
        tiles = self.problem.tiles
        device = self.problem.q.device
        tile = sampled // tiles.tile_tokens
        visible = torch.tensor([tiles.candidates(i) for i in tile.tolist()], device=device)
        # A block that the row's tile has no candidate for is part of the local region.
        local = torch.arange(tiles.blocks, device=device) >= visible[:, None]  # [samples, blocks]
        rows = sampled.to(device)
        tile = tile.to(device)
        heads = range(len(self.problem.k))
        parts = [self._head(head, rows, tile, local=local, weights=weights) for head in heads]
        return Verification(
            kept_mass=torch.stack([part.kept_mass for part in parts]),
            output_error=torch.stack([part.output_error for part in parts]),
            weighted=torch.stack([part.weighted for part in parts]),
        )

    def _head(
        self, head: int, rows: Tensor, tile: Tensor, *, local: Tensor, weights: Tensor | None
    ) -> Verification:
        """Verify rows of one KV head: measurements without their first dimension.

        Args:
            head: which.
            rows: [samples] numbers of the queries.
            tile: [samples] which tile each is in.
            local: [samples, blocks] bool, blocks of the local region.
            weights: [samples, keys].
        """
        problem = self.problem
        result = self.result
        tiles = self.problem.tiles
        q = by_kv_head(problem.q, len(problem.k))[head][:, rows]
        p, exact_lse = exact_rows(
            q,
            problem.k[head],
            position=tiles.q_offset + rows,
            q_offset=tiles.q_offset,
            scale=problem.scale,
            scratch=self.scratch,
        )
        out = by_kv_head(result.out, len(problem.k))[head][:, rows].to(p.dtype)
        lse = by_kv_head(result.lse, len(problem.k))[head][:, rows].to(p.dtype)
        # Of tokens that were attended p~ is p times this, as their scores are the same.
        ratio = torch.exp(exact_lse.view_as(lse) - lse).clamp(max=1)
        k_mean = problem.summaries.k_mean[head, : tiles.blocks]
        logit = (q.to(p.dtype) * problem.scale) @ k_mean.to(p.dtype).T
        logit = logit + result.bias[head, tile] - lse[..., None]  # [queries_per_kv, samples, b]
        kept = self._kept_mass(p, ratio, logit, result.keep[head, tile] | local)
        exact = weigh_values(p, problem.v[head].to(p.dtype)).view_as(out)
        kept, error = measure_rows(kept, out, lse, exact)
        return Verification(
            kept_mass=kept,
            output_error=error,
            weighted=p.new_empty(0) if weights is None else visible_mass(p, weights),
        )

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


def measure_rows(
    kept_mass: Tensor, out: Tensor, lse: Tensor, exact: Tensor
) -> tuple[Tensor, Tensor]:
    """Kept mass and relative output error of rows; 0 and 1 where any of it is not a number.

    An infinite log-sum-exp would make p~ anything, so that such a row keeps nothing.

    Args:
        kept_mass: [...] sum of min(p, p~).
        out, lse: [..., head_dim] and [...], what the approximation gave.
        exact: [..., head_dim], the exact output.
    """
    error = (out - exact).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-30)
    sound = finite_rows(out) & lse.isfinite() & error.isfinite() & kept_mass.isfinite()
    return torch.where(sound, kept_mass, 0.0), torch.where(sound, error, 1.0)


def finite_rows(out: Tensor) -> Tensor:
    """[...] bool: whether all of [..., head_dim] are numbers."""
    return out.isfinite().all(-1)
