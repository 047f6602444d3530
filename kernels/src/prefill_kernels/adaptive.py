"""All four steps in one call: summarise, estimate, select, attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefill_kernels.block_attention import block_sparse_attention
from prefill_kernels.block_loss import estimate_block_loss
from prefill_kernels.block_selection import select_blocks
from prefill_kernels.block_summaries import summarize_blocks
from prefill_kernels.csr import BlockCSR
from prefill_kernels.formats import DroppedBlocks, Tiling


class AdaptiveOutput(NamedTuple):
    """What ``adaptive_attention`` returns.

    Attributes:
        out: [q_heads, queries, head_dim], in the queries' dtype.
        lse: [q_heads, queries] float32, the log-sum-exp of each row's scores.
        kept: the blocks that were read; all other candidates were attended to by their summaries.
        candidates: how many (KV head, tile, block) triples selection chose from.
    """

    out: Tensor
    lse: Tensor
    kept: BlockCSR
    candidates: int


def adaptive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, tiling: Tiling, epsilon: float | Tensor
) -> AdaptiveOutput:
    """Causal attention that reads the fewest blocks that misplace at most ``epsilon`` of the mass.

    The first block is always read: it holds the attention sinks (arXiv 2309.17453). A caller who
    prefills in chunks keeps the summaries of earlier chunks and calls the four steps.

    Args:
        q: [q_heads, queries, head_dim].
        k, v: [kv_heads, keys, head_dim], or pages as ``tiling.block_table`` says.
        tiling: ``tile_tokens`` must be a multiple of 4.
        epsilon: attention mass that a tile's summaries may misplace, mean over its rows, of all KV
            heads or [kv_heads] float32 of each.

    Raises:
        ValueError: shapes, dtypes or a tiling that do not fit.
    """
    summaries = summarize_blocks(
        k, v, block_tokens=tiling.block_tokens, block_table=tiling.block_table
    )
    loss, _, bias = estimate_block_loss(q, k, summaries, tiling=tiling)
    kv_heads, tiles, blocks = loss.shape
    forced = torch.zeros(tiles, blocks, dtype=torch.bool, device=q.device)
    forced[:, :1] = True
    limits = torch.as_tensor(epsilon, dtype=torch.float32, device=q.device).expand(kv_heads)
    kept, bias = select_blocks(loss, bias, forced, limits)
    dropped = DroppedBlocks(summaries.k_mean, summaries.v_mean, bias)
    out, lse = block_sparse_attention(q, k, v, kept, tiling=tiling, dropped=dropped)
    candidates = kv_heads * sum(tiling.candidates(tile) for tile in range(tiles))
    return AdaptiveOutput(out, lse, kept, candidates)
