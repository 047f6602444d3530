"""Sparse attention of all KV heads on one rank, without anything around it."""

from __future__ import annotations

import torch
from torch import Tensor

from prefill_service.attention.sparse.cpu_backend import CpuBackend
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.tiles import Tiles


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


def attend_on_cpu(problem: SparseProblem) -> SparseResult:
    return CpuBackend().attend_sparse(problem, NoHooks())
