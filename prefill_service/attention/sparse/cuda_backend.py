"""Sparse attention on CUDA: Triton kernels, and no wait for the device."""

from __future__ import annotations

import torch
from prefill_kernels import AttentionOptions, DroppedBlocks, Summaries, Tiling
from typing_extensions import override

from prefill_service.attention.sparse.hooks import BlockHooks
from prefill_service.attention.sparse.problem import SparseBackend, SparseProblem, SparseResult
from prefill_service.attention.sparse.selection import force_keep
from prefill_service.attention.stopwatch import Stopwatch


class CudaBackend(SparseBackend):
    """Estimate, selection and attention in kernels; other ranks attend to nothing for this one."""

    @override
    def attend_sparse(self, problem: SparseProblem, hooks: BlockHooks) -> SparseResult:
        # Triton is imported where it runs: without a GPU nothing needs it.
        from prefill_kernels import block_sparse_attention, estimate_block_loss, select_blocks

        clock = Stopwatch(problem.q.device)
        tiles = problem.tiles
        known = problem.summaries.first(tiles.blocks)
        tiling = Tiling(
            block_tokens=tiles.block_tokens,
            tile_tokens=tiles.tile_tokens,
            q_offset=tiles.q_offset,
        )
        loss, peak, candidates = estimate_block_loss(
            problem.q, problem.k, Summaries(*known.parts), tiling=tiling, scale=problem.scale
        )
        losses = force_keep(loss, peak, problem.row_limit.float())
        forced = problem.forced.to(problem.q.device)
        csr, bias = select_blocks(losses, candidates, forced, problem.epsilon.float())
        keep = (bias == -torch.inf) & (candidates != -torch.inf)  # NaN is a candidate, and kept
        clock.lap("select")
        hooks.fetch_blocks(keep.any(1), problem.heads)
        clock.lap("fetch")
        out, lse = block_sparse_attention(
            problem.q,
            problem.k,
            problem.v,
            csr,
            tiling=tiling,
            dropped=DroppedBlocks(known.k_mean, known.v_mean, bias),
            options=AttentionOptions(scale=problem.scale),
        )
        clock.lap("attend")
        return SparseResult(out=out, lse=lse, keep=keep, bias=bias, clock=clock)
