"""Sparse attention on CUDA: Triton kernels, and no wait for the device."""

from __future__ import annotations

import torch
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
        from prefill_kernels.block_loss import estimate_loss
        from prefill_kernels.block_selection import select_blocks
        from prefill_kernels.block_sparse_attention import block_sparse_attention

        clock = Stopwatch(problem.q.device)
        tiles = problem.tiles
        known = problem.summaries.first(tiles.blocks)
        loss, peak, candidates = estimate_loss(
            problem.q,
            problem.k,
            known.k_mean,
            known.k_var,
            known.k_far,
            known.far_count,
            block_tokens=tiles.block_tokens,
            tile_tokens=tiles.tile_tokens,
            q_offset=tiles.q_offset,
            scale=problem.scale,
        )
        losses = force_keep(loss, peak, problem.row_limit.float())
        forced = problem.forced.to(problem.q.device)
        csr, bias = select_blocks(losses, candidates, forced, problem.epsilon.float())
        keep = (bias == -torch.inf) & (candidates != -torch.inf)  # NaN is a candidate, and kept
        clock.lap("select")
        hooks.fetch(keep.any(1), problem.heads)
        clock.lap("fetch")
        out, lse = block_sparse_attention(
            problem.q,
            problem.k,
            problem.v,
            csr,
            block_tokens=tiles.block_tokens,
            tile_tokens=tiles.tile_tokens,
            q_offset=tiles.q_offset,
            scale=problem.scale,
            summaries=(known.k_mean, known.v_mean),
            bias=bias,
        )
        clock.lap("attend")
        return SparseResult(out=out, lse=lse, keep=keep, bias=bias, clock=clock)
