"""Block loss on the device: what each block's summary would misplace if it stood for the block.

The attention mass of a candidate block, and which share of it is misplaced, both from summaries
alone (``estimate_block_loss`` has the formulas). ``block_selection`` thresholds it. Nothing here
waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.block_attention import block_sparse_lse, dot
from prefill_kernels.constants import ROW_STEP, largest_of_normals
from prefill_kernels.csr import BlockCSR
from prefill_kernels.formats import AttentionOptions, BlockLoss, DroppedBlocks, Summaries, Tiling
from prefill_kernels.inputs import check_attention

_STEP = tl.constexpr(ROW_STEP)
_TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def square_kernel(
    p_q,
    p_squared,
    stride_q_head,
    stride_q_token,
    queries,
    tiles,
    tile_tokens,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile's mean squared scaled query [d]."""
    i_row = tl.program_id(0)
    i_head = i_row // tiles
    i_tile = i_row % tiles
    tokens = tl.minimum(tile_tokens, queries - i_tile * tile_tokens)
    o_d = tl.arange(0, BLOCK_D)
    d_mask = o_d < HEAD_DIM
    steps = tl.cdiv(tokens, BLOCK_M)
    squared = tl.zeros([BLOCK_D], tl.float32)
    for i in range(GROUP * steps):
        o_token = i % steps * BLOCK_M + tl.arange(0, BLOCK_M)
        o_q = (i_head * GROUP + i // steps).to(tl.int64) * stride_q_head
        o_q += (i_tile * tile_tokens).to(tl.int64) * stride_q_token
        p_tile = p_q + o_q + o_token[:, None] * stride_q_token + o_d[None, :]
        mask = (o_token < tokens)[:, None] & d_mask[None, :]
        b_q = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        squared += tl.sum(b_q * b_q, 0)
    squared *= scale * scale / (GROUP * tokens)
    tl.store(p_squared + i_row.to(tl.int64) * HEAD_DIM + o_d, squared, mask=d_mask)


@triton.jit
def bias_kernel(
    p_variance,
    p_bias,
    tiles,
    blocks,
    tile_tokens,
    q_offset,
    LOG_BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A block summary's additive logit: ln B + lift of the scores' variance."""
    i_row = tl.program_id(0)
    candidates = (q_offset + i_row % tiles * tile_tokens) // BLOCK_TOKENS
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = i_row.to(tl.int64) * blocks + o_n
    variance = tl.load(p_variance + o_row, mask=o_n < blocks, other=0.0)
    frozen = EDGE * tl.sqrt(variance) - 0.5 * EDGE * EDGE
    lift = tl.where(variance <= EDGE * EDGE, 0.5 * variance, frozen)
    bias = tl.where(o_n < candidates, lift + LOG_BLOCK, float("-inf"))
    tl.store(p_bias + o_row, bias, mask=o_n < blocks)


@triton.jit
def loss_kernel(
    p_q,
    p_lse,
    p_k_mean,
    p_k_far,
    p_far_count,
    p_variance,
    p_bias,
    p_loss,
    p_peak,
    stride_q_head,
    stride_q_token,
    queries,
    tiles,
    tile_tokens,
    q_offset,
    blocks,
    scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Losses and peaks of BLOCK_N blocks for a (KV head, tile)."""
    i_row = tl.program_id(0)
    i_head = i_row // tiles
    i_tile = i_row % tiles
    candidates = (q_offset + i_tile * tile_tokens) // BLOCK_TOKENS
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = i_row.to(tl.int64) * blocks + o_n
    if tl.program_id(1) * BLOCK_N >= candidates:
        tl.store(p_loss + o_row, tl.zeros([BLOCK_N], tl.float32), mask=o_n < blocks)
        tl.store(p_peak + o_row, tl.zeros([BLOCK_N], tl.float32), mask=o_n < blocks)
        return
    inside = o_n < candidates
    o_block = i_head.to(tl.int64) * blocks + o_n
    o_d = tl.arange(0, BLOCK_D)
    o_key = o_block[:, None] * HEAD_DIM + o_d[None, :]
    k_mask = inside[:, None] & (o_d < HEAD_DIM)[None, :]
    tokens = tl.minimum(tile_tokens, queries - i_tile * tile_tokens)
    p_lse += (i_head * GROUP).to(tl.int64) * queries + i_tile * tile_tokens
    p_q += (i_head * GROUP).to(tl.int64) * stride_q_head
    p_q += (i_tile * tile_tokens).to(tl.int64) * stride_q_token
    row_strides = (stride_q_head, stride_q_token, queries)

    b_k = tl.load(p_k_mean + o_key, mask=k_mask, other=0.0)  # [N, D]
    bias = tl.load(p_bias + o_row, mask=inside, other=float("-inf"))
    mass, mass_peak = _mass_of_keys(
        p_q, p_lse, b_k, bias, GROUP * tokens, tokens, row_strides, scale, HEAD_DIM, BLOCK_M
    )
    variance = tl.load(p_variance + o_row, mask=inside, other=0.0)
    misplaced = tl.sqrt(1 - tl.exp(variance / -_TWO_PI))

    # A few keys among many (the needle) hide in mean and variance: ask for the outliers by
    # themselves. In a loop of its own, so that only one tile of keys is held at a time.
    b_k = tl.load(p_k_far + o_key, mask=k_mask, other=0.0)
    far, far_peak = _mass_of_keys(
        p_q, p_lse, b_k, None, GROUP * tokens, tokens, row_strides, scale, HEAD_DIM, BLOCK_M
    )
    count = tl.load(p_far_count + o_block, mask=inside, other=1.0)
    far_peak = tl.minimum(far_peak * count, 1.0)

    loss = (mass * misplaced + far) / (GROUP * tl.cdiv(tokens, _STEP))
    peak = tl.maximum(mass_peak * misplaced, far_peak)
    tl.store(p_loss + o_row, tl.where(inside, loss, 0.0), mask=o_n < blocks)
    tl.store(p_peak + o_row, tl.where(inside, peak, 0.0), mask=o_n < blocks)


@triton.jit
def _mass_of_keys(
    p_q,
    p_lse,
    b_k,
    bias,
    rows,
    tokens,
    row_strides,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Attention mass of keys b_k [N, D] in a tile's rows, two of [N].

    The first is summed over every fourth token's rows, the second the largest of all rows.

    bias: [N] added to the scores of keys that stand for blocks. Without it a key is a single one,
    and no row gives it more than 1: it may be missing from the row's log-sum-exp.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    N: tl.constexpr = b_k.shape[0]
    mass = tl.zeros([N], tl.float32)
    peak = tl.zeros([N], tl.float32)
    for start in tl.range(0, rows, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_q, lse = _load_rows(p_q, p_lse, o_m, rows, tokens, row_strides, HEAD_DIM, b_k.shape[1])
        score = dot(b_q, b_k.T) * (scale * LOG2E)  # [M, N]
        if bias is not None:
            score += bias[None, :] * LOG2E
        p = tl.exp2(score - lse[:, None] * LOG2E)
        if bias is None:
            p = tl.minimum(p, 1.0)
        asked = o_m % tokens % _STEP == 0
        mass += tl.sum(tl.where(asked[:, None], p, 0.0), 0)
        peak = tl.maximum(peak, tl.max(p, 0))
    return mass, peak


@triton.jit
def _load_rows(
    p_q,
    p_lse,
    o_m,
    rows,
    tokens,
    row_strides,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
):
    """Queries [M, D] of a tile's rows o_m and their log-sum-exp [M], infinite behind the last row.

    row_strides: of a head's queries, of a query, and of a head's log-sum-exps.
    """
    stride_q_head, stride_q_token, stride_lse_head = row_strides
    valid = o_m < rows
    head = (o_m // tokens).to(tl.int64)
    o_d = tl.arange(0, D)
    o_q = head * stride_q_head + o_m % tokens * stride_q_token
    q_mask = valid[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=q_mask, other=0.0)
    lse = tl.load(p_lse + head * stride_lse_head + o_m % tokens, mask=valid, other=float("inf"))
    return b_q, lse


def estimate_block_loss(
    q: Tensor, k: Tensor, summaries: Summaries, *, tiling: Tiling, scale: float | None = None
) -> BlockLoss:
    """Attention mass that each block's summary would misplace, for every query tile.

    With v the variance of a block's scores (mean over the tile's rows, from the diagonal variance
    of its keys), B its tokens and f(v) the lift, v / 2 up to e^2 and e sqrt(v) - e^2 / 2 beyond,
    where e is the largest of B normal values to expect: block score s = scale q . k_mean + ln B +
    f(v); mass p = exp(s - lse), lse over all candidate blocks and the row's exact local scores;
    a row's loss = p * sqrt(1 - exp(-v / 2 pi)), plus the mass of one outlier of the block,
    exp(scale q . k_far - lse), at most 1; its peak counts all outliers. The mean is over every
    fourth token's rows, the peak over all.

    A query that is not a number makes every loss of its tile NaN: all its blocks are then kept, and
    no row but its own is NaN. (The CPU back end lets its tile's other queries choose.)

    Args:
        q, k: as in ``block_sparse_attention``.
        summaries: of the blocks before the last tile's first query at least.
        tiling: tiles, blocks and positions.
        scale: factor on the scores; default ``head_dim ** -0.5``.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    check_attention(q, k, k, tiling)
    kv_heads, blocks, _ = summaries.k_mean.shape
    tiles = tiling.num_tiles(q.shape[1])
    _check(summaries, tiling, tiles)
    loss = torch.zeros((kv_heads, tiles, blocks), dtype=torch.float32, device=q.device)
    found = BlockLoss(loss, torch.zeros_like(loss), torch.full_like(loss, -torch.inf))
    if loss.numel() == 0:
        return found
    scale = scale or q.shape[2] ** -0.5
    summaries = summaries._replace(
        k_mean=summaries.k_mean.to(q.dtype).contiguous(),
        k_far=summaries.k_far.to(q.dtype).contiguous(),
    )
    variance = _score_variance(q, summaries.k_var, tiling, scale)
    _write_bias(found.bias, variance, tiling)
    every = DroppedBlocks(summaries.k_mean, summaries.k_mean, found.bias)
    lse = _whole_lse(q, k, every, tiling, scale=scale)
    _write_loss(q, lse, summaries, variance, found=found, tiling=tiling, scale=scale)
    return found


def _check(summaries: Summaries, tiling: Tiling, tiles: int) -> None:
    shape = list(summaries.k_mean.shape)
    if tiles and tiling.candidates(tiles - 1) > shape[1]:
        raise ValueError(f"summaries of {shape[1]} blocks do not reach the last tile's first query")
    for name, x in (("k_var", summaries.k_var), ("k_far", summaries.k_far)):
        if list(x.shape) != shape:
            raise ValueError(f"{name} is {list(x.shape)}, expected {shape}")
    if list(summaries.far_count.shape) != shape[:2]:
        raise ValueError(f"far_count is {list(summaries.far_count.shape)}, expected {shape[:2]}")


def _score_variance(q: Tensor, k_var: Tensor, tiling: Tiling, scale: float) -> Tensor:
    """[kv_heads, tiles, blocks] variance of the scores that a tile's rows have in a block."""
    q_heads, queries, head_dim = q.shape
    kv_heads = len(k_var)
    tiles = tiling.num_tiles(queries)
    squared = torch.empty((kv_heads, tiles, head_dim), dtype=torch.float32, device=q.device)
    square_kernel[(kv_heads * tiles,)](
        q,
        squared,
        q.stride(0),
        q.stride(1),
        queries,
        tiles,
        tiling.tile_tokens,
        scale,
        GROUP=q_heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=64,
        enable_fp_fusion=True,
    )
    return squared @ k_var.float().transpose(1, 2)


def _write_bias(bias: Tensor, variance: Tensor, tiling: Tiling) -> None:
    """Fill in the logits of the summaries."""
    kv_heads, tiles, blocks = bias.shape
    block_n = 1024
    bias_kernel[kv_heads * tiles, triton.cdiv(blocks, block_n)](
        variance,
        bias,
        tiles,
        blocks,
        tiling.tile_tokens,
        tiling.q_offset,
        BLOCK_TOKENS=tiling.block_tokens,
        LOG_BLOCK=math.log(tiling.block_tokens),
        EDGE=largest_of_normals(tiling.block_tokens),
        BLOCK_N=block_n,
        enable_fp_fusion=True,
    )


def _whole_lse(
    q: Tensor, k: Tensor, summaries: DroppedBlocks, tiling: Tiling, *, scale: float
) -> Tensor:
    """[q_heads, queries] log-sum-exp over the local region and all summaries."""
    kv_heads, tiles, _ = summaries.bias.shape
    row_ptr = torch.zeros(kv_heads * tiles + 1, dtype=torch.int32, device=q.device)
    return block_sparse_lse(
        q,
        k,
        BlockCSR(row_ptr, row_ptr[:1]),  # no block is kept
        tiling=tiling,
        dropped=summaries,
        options=AttentionOptions(scale=scale),
    )


def _write_loss(
    q: Tensor,
    lse: Tensor,
    summaries: Summaries,
    variance: Tensor,
    *,
    found: BlockLoss,
    tiling: Tiling,
    scale: float,
) -> None:
    """Fill in losses and peaks; mean keys and outliers are in the queries' dtype.

    Args:
        lse: [q_heads, queries] (``_whole_lse``).
        variance: [kv_heads, tiles, blocks] (``_score_variance``).
        found: whose biases are known.
    """
    q_heads, queries, head_dim = q.shape
    kv_heads, tiles, blocks = found.loss.shape
    # With 128 rows of 128 blocks the registers of sm_90 do not suffice.
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = 64 if block_d > 128 or q.dtype == torch.float32 else 128
    loss_kernel[kv_heads * tiles, triton.cdiv(blocks, block_n)](
        q,
        lse,
        summaries.k_mean,
        summaries.k_far,
        summaries.far_count.float().contiguous(),
        variance,
        found.bias,
        found.loss,
        found.peak,
        q.stride(0),
        q.stride(1),
        queries,
        tiles,
        tiling.tile_tokens,
        tiling.q_offset,
        blocks,
        scale,
        GROUP=q_heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_TOKENS=tiling.block_tokens,
        BLOCK_M=64,
        BLOCK_N=block_n,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=True,
    )
