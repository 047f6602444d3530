"""Block loss on the device: what each block's summary would misplace if it stood for the block.

The attention mass of a candidate block, and which share of it is misplaced, both from summaries
alone (docs/attention.md derives the formulas). ``selection`` thresholds it. Nothing here waits for
the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.block_sparse_attention import block_sparse_attention
from prefill_kernels.csr import BlockCSR
from prefill_kernels.dot import dot

ROW_STEP = tl.constexpr(4)
"""Every fourth token of a tile is asked for the blocks' mass: neighbours want the same ones."""
_TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def square_kernel(p_q, p_squared, stride_q_head, stride_q_token, queries, tiles, tile_tokens, scale,
                  GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                  BLOCK_M: tl.constexpr):  # fmt: skip
    """A tile's mean squared scaled query [d]."""
    i_row = tl.program_id(0)
    i_head, i_tile = i_row // tiles, i_row % tiles
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
def bias_kernel(p_variance, p_bias, tiles, blocks, tile_tokens, q_offset, LOG_BLOCK: tl.constexpr,
                EDGE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
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


# fmt: off
@triton.jit
def loss_kernel(
    p_q, p_lse, p_k_mean, p_k_far, p_far_count, p_variance, p_bias, p_loss, p_peak,
    stride_q_head, stride_q_token, queries, tiles, tile_tokens, q_offset, blocks, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    """Losses and peaks of BLOCK_N blocks for a (KV head, tile). p_lse: of the asked tokens only."""
    LOG2E: tl.constexpr = 1.4426950408889634
    i_row = tl.program_id(0)
    i_head, i_tile = i_row // tiles, i_row % tiles
    candidates = (q_offset + i_tile * tile_tokens) // BLOCK_TOKENS
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_row = i_row.to(tl.int64) * blocks + o_n
    if tl.program_id(1) * BLOCK_N >= candidates:
        tl.store(p_loss + o_row, tl.zeros([BLOCK_N], tl.float32), mask=o_n < blocks)
        tl.store(p_peak + o_row, tl.zeros([BLOCK_N], tl.float32), mask=o_n < blocks)
        return
    tokens = tl.minimum(tile_tokens, queries - i_tile * tile_tokens)
    asked = tl.cdiv(tokens, ROW_STEP)
    rows = GROUP * asked
    inside = o_n < candidates
    o_d = tl.arange(0, BLOCK_D)
    d_mask = o_d < HEAD_DIM
    mask = inside[:, None] & d_mask[None, :]
    o_block = (i_head.to(tl.int64) * blocks + o_n)[:, None] * HEAD_DIM + o_d[None, :]
    columns = tl.cdiv(queries, ROW_STEP)
    p_lse += (i_head * GROUP).to(tl.int64) * columns + i_tile * (tile_tokens // ROW_STEP)
    p_q += (i_head * GROUP).to(tl.int64) * stride_q_head
    p_q += (i_tile * tile_tokens).to(tl.int64) * stride_q_token

    b_k = tl.load(p_k_mean + o_block, mask=mask, other=0.0)  # [N, D]
    bias = tl.load(p_bias + o_row, mask=inside, other=float("-inf")) * LOG2E
    mass = tl.zeros([BLOCK_N], tl.float32)
    mass_peak = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, rows, BLOCK_M):
        b_q, lse = _asked_rows(p_q, p_lse, start + tl.arange(0, BLOCK_M), rows, asked, columns,
                               stride_q_head, stride_q_token, o_d, HEAD_DIM)  # fmt: skip
        score = dot(b_q, b_k.T) * (scale * LOG2E) + bias[None, :] - lse[:, None] * LOG2E
        p = tl.exp2(score)
        mass += tl.sum(p, 0)
        mass_peak = tl.maximum(mass_peak, tl.max(p, 0))
    variance = tl.load(p_variance + o_row, mask=inside, other=0.0)
    misplaced = tl.sqrt(1 - tl.exp(variance / -_TWO_PI))

    # A few keys among many (the needle) hide in mean and variance: ask for the outliers by
    # themselves. In a loop of its own, so that only one tile of keys is held at a time.
    b_k = tl.load(p_k_far + o_block, mask=mask, other=0.0)
    far = tl.zeros([BLOCK_N], tl.float32)
    far_peak = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, rows, BLOCK_M):
        b_q, lse = _asked_rows(p_q, p_lse, start + tl.arange(0, BLOCK_M), rows, asked, columns,
                               stride_q_head, stride_q_token, o_d, HEAD_DIM)  # fmt: skip
        score = dot(b_q, b_k.T) * (scale * LOG2E) - lse[:, None] * LOG2E
        p = tl.minimum(tl.exp2(score), 1.0)
        far += tl.sum(p, 0)
        far_peak = tl.maximum(far_peak, tl.max(p, 0))
    count = tl.load(p_far_count + i_head.to(tl.int64) * blocks + o_n, mask=inside, other=1.0)
    far_peak = tl.minimum(far_peak * count, 1.0)
    loss = (mass * misplaced + far) / rows
    peak = tl.maximum(mass_peak * misplaced, far_peak)
    tl.store(p_loss + o_row, tl.where(inside, loss, 0.0), mask=o_n < blocks)
    tl.store(p_peak + o_row, tl.where(inside, peak, 0.0), mask=o_n < blocks)


@triton.jit
def _asked_rows(p_q, p_lse, o_m, rows, asked, columns, stride_q_head, stride_q_token, o_d,
                HEAD_DIM: tl.constexpr):  # fmt: skip
    """Queries [M, D] of some asked rows and their log-sum-exp, infinite behind the last row."""
    valid = o_m < rows
    head = (o_m // asked).to(tl.int64)
    o_q = head * stride_q_head + o_m % asked * ROW_STEP * stride_q_token
    q_mask = valid[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=q_mask, other=0.0)
    lse = tl.load(p_lse + head * columns + o_m % asked, mask=valid, other=float("inf"))
    return b_q, lse


def estimate_loss(
    q: Tensor,
    k: Tensor,
    k_mean: Tensor,
    k_var: Tensor,
    k_far: Tensor,
    far_count: Tensor,
    *,
    block_tokens: int,
    tile_tokens: int,
    q_offset: int,
    scale: float,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention mass that each block's summary would misplace, for every query tile.

    With v the variance of a block's scores (mean over the tile's rows, from the diagonal variance
    of its keys), B its tokens and f(v) the lift, v / 2 up to e^2 and e sqrt(v) - e^2 / 2 beyond,
    where e is the largest of B normal values to expect: block score s = scale q . k_mean + ln B +
    f(v); mass p = exp(s - lse), lse over all candidate blocks and the row's exact local scores;
    a row's loss = p * sqrt(1 - exp(-v / 2 pi)), plus the mass of one outlier of the block,
    exp(scale q . k_far - lse), at most 1; its peak counts all outliers. Rows of every
    fourth token are asked.

    A query that is not a number makes every loss of its tile NaN: all its blocks are then kept, and
    no row but its own is NaN. (On a CPU its tile's other queries choose.)

    Args:
        q, k, block_tokens, tile_tokens, q_offset, scale, block_table: as in
            ``block_sparse_attention``; ``tile_tokens`` a multiple of 4.
        k_mean, k_var, k_far: [kv_heads, blocks, head_dim] of ``block_summaries``; at least the
            blocks before the last tile's first query.
        far_count: [kv_heads, blocks], likewise.

    Returns:
        Each [kv_heads, tiles, blocks] float32. Loss: mean over the asked rows; 0 where a block is
        no candidate of the tile. Peak: the largest value that either part of the loss has in any
        row; 0 likewise. Bias: logit to add to the summary's
        score; -inf where it is no candidate.

    Raises:
        ValueError: shapes, dtypes or values that do not fit.
    """
    q_heads, queries, head_dim = q.shape
    kv_heads, blocks, _ = k_mean.shape
    if tile_tokens < 1 or tile_tokens % ROW_STEP.value:
        raise ValueError(f"tile_tokens = {tile_tokens} is no multiple of {ROW_STEP.value}")
    tiles = triton.cdiv(queries, tile_tokens)
    if tiles and (q_offset + (tiles - 1) * tile_tokens) // block_tokens > blocks:
        raise ValueError(f"summaries of {blocks} blocks do not reach the last tile's first query")
    for name, x in (("k_var", k_var), ("k_far", k_far)):
        if x.shape != k_mean.shape:
            raise ValueError(f"{name} is {list(x.shape)}, expected {list(k_mean.shape)}")
    if far_count.shape != k_mean.shape[:2]:
        raise ValueError(f"far_count is {list(far_count.shape)}, expected {list(k_mean.shape[:2])}")
    loss = torch.zeros((kv_heads, tiles, blocks), dtype=torch.float32, device=q.device)
    peak, bias = torch.zeros_like(loss), torch.full_like(loss, -torch.inf)
    if loss.numel() == 0:
        return loss, peak, bias
    group, rows = q_heads // kv_heads, kv_heads * tiles
    block_d = max(16, triton.next_power_of_2(head_dim))
    squared = torch.empty((kv_heads, tiles, head_dim), dtype=torch.float32, device=q.device)
    shared = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "enable_fp_fusion": True}
    square_kernel[(rows,)](
        q, squared, q.stride(0), q.stride(1), queries, tiles, tile_tokens, scale, BLOCK_M=64,
        **shared,
    )  # fmt: skip
    variance = squared @ k_var.float().transpose(1, 2)  # [kv_heads, tiles, blocks]
    block_n = 1024
    bias_kernel[rows, triton.cdiv(blocks, block_n)](
        variance, bias, tiles, blocks, tile_tokens, q_offset, BLOCK_TOKENS=block_tokens,
        LOG_BLOCK=math.log(block_tokens), EDGE=_largest_of_normals(block_tokens), BLOCK_N=block_n,
        enable_fp_fusion=True,
    )  # fmt: skip
    none = BlockCSR(*(torch.zeros(n, dtype=torch.int32, device=q.device) for n in (rows + 1, 1)))
    k_mean, k_far = (x.to(q.dtype).contiguous() for x in (k_mean, k_far))
    far_count = far_count.float().contiguous()
    step = ROW_STEP.value
    _, lse = block_sparse_attention(
        q[:, ::step], k, k, none, block_tokens=block_tokens, tile_tokens=tile_tokens // step,
        q_offset=q_offset, scale=scale, block_table=block_table, summaries=(k_mean, k_mean),
        bias=bias, query_step=step, lse_only=True,
    )  # fmt: skip
    # With 128 rows of 128 blocks the registers of sm_90 do not suffice.
    block_m, block_n = 64, 64 if block_d > 128 or q.dtype == torch.float32 else 128
    loss_kernel[rows, triton.cdiv(blocks, block_n)](
        q, lse, k_mean, k_far, far_count, variance, bias, loss, peak, q.stride(0), q.stride(1),
        queries, tiles, tile_tokens, q_offset, blocks, scale, BLOCK_TOKENS=block_tokens,
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=2, **shared,
    )  # fmt: skip
    return loss, peak, bias


def _largest_of_normals(count: int) -> float:
    """Location of the largest of ``count`` standard normal values (Fisher & Tippett, 1928)."""
    leading = math.sqrt(2 * math.log(count))
    return leading - (math.log(math.log(count)) + math.log(4 * math.pi)) / (2 * leading)


def estimate_loss_reference(
    q: Tensor,
    k: Tensor,
    k_mean: Tensor,
    k_var: Tensor,
    k_far: Tensor,
    far_count: Tensor,
    *,
    block_tokens: int,
    tile_tokens: int,
    q_offset: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``estimate_loss`` computes for contiguous keys, naively and in float64."""
    (q_heads, queries, _), (kv_heads, blocks, _) = q.shape, k_mean.shape
    tiles, log_block = triton.cdiv(queries, tile_tokens), math.log(block_tokens)
    edge = _largest_of_normals(block_tokens)
    loss = torch.zeros((kv_heads, tiles, blocks), dtype=torch.float64)
    peak, bias = torch.zeros_like(loss), torch.full_like(loss, -torch.inf)
    q, k, k_mean, k_var, k_far = (x.double() for x in (q, k, k_mean, k_var, k_far))
    far_count = far_count.double()
    for h in range(kv_heads):
        heads = slice(h * q_heads // kv_heads, (h + 1) * q_heads // kv_heads)
        for t in range(tiles):
            tokens = torch.arange(t * tile_tokens, min((t + 1) * tile_tokens, queries))
            n = (q_offset + t * tile_tokens) // block_tokens
            rows = q[heads, tokens] * scale  # [group, tokens, d]
            keys = torch.arange(n * block_tokens, q_offset + int(tokens[-1]) + 1)
            local = rows @ k[h, keys].T
            local = local.masked_fill(keys > (q_offset + tokens)[:, None], -torch.inf)
            variance = k_var[h, :n] @ rows.square().mean((0, 1))
            frozen = edge * variance.sqrt() - edge**2 / 2
            lift = torch.where(variance <= edge**2, variance / 2, frozen)
            bias[h, t, :n] = log_block + lift
            scores = rows @ k_mean[h, :n].T + bias[h, t, :n]
            lse = torch.cat([scores, local], -1).logsumexp(-1)  # [group, tokens]
            asked = slice(None, None, ROW_STEP.value)
            mass = (scores - lse[..., None]).exp()[:, asked]  # [group, asked tokens, blocks]
            mass = mass * (1 - (-variance / (2 * math.pi)).exp()).sqrt()
            far = (rows @ k_far[h, :n].T - lse[..., None]).exp().clamp(max=1)[:, asked]
            loss[h, t, :n] = (mass + far).mean((0, 1))
            far = (far * far_count[h, :n]).clamp(max=1)
            peak[h, t, :n] = torch.maximum(mass.amax((0, 1)), far.amax((0, 1)))
    return loss, peak, bias
