"""Sparse attention of all KV heads on one rank, without anything around it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from prefill_service.attention.sparse.cpu_backend import CpuBackend
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.tiles import Tiles
from tests.attention.oracle import causal_scores


def sparse_problem(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    tiles: Tiles,
    *,
    epsilon: Tensor,
    forced: Tensor,
    scale: float,
    row_limit: Tensor | None = None,
) -> SparseProblem:
    """Without a row limit rows have no say in what is kept."""
    k, v = kv
    return SparseProblem(
        q=q,
        k=k,
        v=v,
        heads=torch.arange(len(k)),
        summaries=summaries_of(k, v, tiles),
        tiles=tiles,
        epsilon=epsilon,
        row_limit=torch.full_like(epsilon, torch.inf) if row_limit is None else row_limit,
        forced=forced,
        scale=scale,
    )


def summaries_of(k: Tensor, v: Tensor, tiles: Tiles) -> BlockSummaries:
    """Of all blocks that some tile has as a candidate."""
    end = tiles.blocks * tiles.block_tokens
    return summarize(k[:, :end], v[:, :end], tiles.block_tokens)


def lone_needles(tiles: Tiles, mass: float, seed: int = 0) -> tuple[SparseProblem, Tensor]:
    """Diffuse attention of eight query and two KV heads, and in every tile a row with a needle.

    A needle is one key that one row alone looks for, at a place in the tile that chance chooses. It
    has ``mass`` of the row's attention, exactly, and no part in any other row.

    Returns:
        The problem, with an epsilon that selects nothing, and [kv_heads, tiles], each needle's
        block.
    """
    random = torch.Generator().manual_seed(seed)
    head_dim = 64
    scale = head_dim**-0.5
    q = torch.randn(8, tiles.queries, head_dim, generator=random).double()
    k, v = 0.5 * torch.randn(2, 2, tiles.keys, head_dim, generator=random).double()
    for x in (q, k):  # one direction for each tile, that nothing but needles has
        x[..., : tiles.count] = 0.0
    blocks = torch.empty(2, tiles.count, dtype=torch.long)
    for kv_head in range(2):
        found = torch.randperm(tiles.candidates(0), generator=random)[: tiles.count]
        blocks[kv_head] = found
        for tile, block in enumerate(found.tolist()):
            head = 4 * kv_head + int(torch.randint(4, (1,), generator=random))
            token = int(torch.randint(tiles.tokens(tile), (1,), generator=random))
            row = q[head : head + 1, tile * tiles.tile_tokens + token][:, None]
            position = tiles.q_offset + tile * tiles.tile_tokens + token
            inside = int(torch.randint(tiles.block_tokens, (1,), generator=random))
            key = block * tiles.block_tokens + inside
            keys = k[kv_head : kv_head + 1]
            keys[0, key] = 0.0
            others = causal_scores(row, keys, position, scale)
            others[..., key] = -torch.inf
            score = float(others.logsumexp(-1)) + math.log(mass / (1 - mass))
            row[..., tile] = 4.0
            keys[0, key, tile] = score / scale / 4  # so large that it is farthest from the mean
    problem = sparse_problem(
        q,
        (k, v),
        tiles,
        epsilon=torch.full((2,), 1e3, dtype=torch.float64),
        forced=torch.zeros(tiles.count, tiles.blocks, dtype=torch.bool),
        scale=scale,
    )
    return problem, blocks


def with_row_limit(problem: SparseProblem, limit: float) -> SparseProblem:
    """The same with a limit for what any row loses in a block."""
    return replace(problem, row_limit=torch.full_like(problem.row_limit, limit))


def attend_on_cpu(problem: SparseProblem) -> SparseResult:
    return CpuBackend().attend_sparse(problem, NoHooks())
