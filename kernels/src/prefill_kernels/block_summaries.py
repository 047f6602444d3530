"""Summaries of key blocks: mean, diagonal variance and outliers of the keys, mean of the values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.formats import Summaries
from prefill_kernels.inputs import as_blocks


@triton.jit
def summaries_kernel(
    p_k,
    p_v,
    p_table,
    p_k_mean,
    p_k_var,
    p_v_mean,
    p_k_far,
    p_far_count,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_table_head,
    blocks,
    PAGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One block of one KV head; see ``summarize_blocks``."""
    i_block = tl.program_id(0)
    i_head = tl.program_id(1)
    page = i_block
    if PAGED:
        page = tl.load(p_table + i_head * stride_table_head + i_block)
    o_n = tl.arange(0, BLOCK_TOKENS)
    o_d = tl.arange(0, BLOCK_D)
    d_mask = o_d < HEAD_DIM
    o_k = page.to(tl.int64) * stride_k_block + i_head.to(tl.int64) * stride_k_head
    p_tile = p_k + o_k + o_n[:, None] * stride_k_token + o_d[None, :]
    b_k = tl.load(p_tile, mask=d_mask[None, :], other=0.0).to(tl.float32)  # [B, D]
    mean = tl.sum(b_k, 0) / BLOCK_TOKENS  # [D]
    centred = tl.where(d_mask[None, :], b_k - mean[None, :], 0.0)
    squared = centred * centred
    distance = tl.sum(squared, 1)  # [B], squared
    farthest = o_n == tl.argmax(distance, 0)  # the first of equals
    direction = tl.sum(tl.where(farthest[:, None], centred, 0.0), 0)  # [D]
    # Of equal keys none is far; the farthest itself counts in any case.
    along = tl.sum(centred * direction[None, :], 1)  # [B]
    outliers = (along > 0.5 * tl.max(distance, 0)) | farthest
    count = tl.sum(outliers.to(tl.float32), 0)
    b_far = tl.sum(tl.where(outliers[:, None], b_k, 0.0), 0) / count
    o_v = page.to(tl.int64) * stride_v_block + i_head.to(tl.int64) * stride_v_head
    p_tile = p_v + o_v + o_n[:, None] * stride_v_token + o_d[None, :]
    b_v = tl.load(p_tile, mask=d_mask[None, :], other=0.0).to(tl.float32)

    o_out = (i_head.to(tl.int64) * blocks + i_block) * HEAD_DIM + o_d
    tl.store(p_k_mean + o_out, mean, mask=d_mask)
    tl.store(p_k_var + o_out, tl.sum(squared, 0) / BLOCK_TOKENS, mask=d_mask)
    tl.store(p_v_mean + o_out, tl.sum(b_v, 0) / BLOCK_TOKENS, mask=d_mask)
    tl.store(p_k_far + o_out, b_far, mask=d_mask)
    tl.store(p_far_count + i_head.to(tl.int64) * blocks + i_block, count)


def summarize_blocks(
    k: Tensor, v: Tensor, *, block_tokens: int, block_table: Tensor | None = None
) -> Summaries:
    """Summaries of every complete block, of all KV heads.

    Args:
        k, v: [kv_heads, keys, head_dim]; keys behind the last complete block are not read. Or,
            with a block table, pages [pages, block_tokens, kv_heads, head_dim].
        block_tokens: a power of two.
        block_table: [blocks] or [kv_heads, blocks] int32, page of each block to summarise.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(k, v, block_tokens, block_table)
    k_blocks = as_blocks(k, block_tokens, block_table is not None)
    v_blocks = as_blocks(v, block_tokens, block_table is not None)
    blocks, kv_heads, _, head_dim = k_blocks.shape
    table_stride = 0
    if block_table is not None:
        blocks = block_table.shape[-1]
        table_stride = block_table.stride(0) if block_table.dim() == 2 else 0
    outputs = torch.empty((4, kv_heads, blocks, head_dim), dtype=torch.float32, device=k.device)
    k_mean, k_var, v_mean, k_far = outputs
    far_count = torch.empty((kv_heads, blocks), dtype=torch.float32, device=k.device)
    if blocks:
        block_d = triton.next_power_of_2(head_dim)
        summaries_kernel[blocks, kv_heads](
            k,
            v,
            block_table,
            k_mean,
            k_var,
            v_mean,
            k_far,
            far_count,
            *k_blocks.stride()[:3],
            *v_blocks.stride()[:3],
            table_stride,
            blocks,
            PAGED=block_table is not None,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_TOKENS=block_tokens,
            num_warps=8 if block_d * block_tokens > 8192 else 4,
            enable_fp_fusion=True,
        )
    return Summaries(k_mean, k_var, v_mean, k_far, far_count)


def _check(k: Tensor, v: Tensor, block_tokens: int, block_table: Tensor | None) -> None:
    if block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens = {block_tokens} is not a power of two")
    if k.shape != v.shape or k.dim() != (3 if block_table is None else 4):
        raise ValueError(f"shapes {list(k.shape)} and {list(v.shape)} of k and v do not fit")
    if block_table is not None and k.shape[1] != block_tokens:
        raise ValueError(f"pages hold {k.shape[1]} tokens, expected block_tokens = {block_tokens}")
