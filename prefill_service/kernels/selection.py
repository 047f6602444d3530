"""Block selection on the device: estimate each block's loss, threshold, build the block-CSR.

The loss of a candidate block is the attention mass that its summary would misplace if it stood for
the block (docs/attention.md derives the formulas). Blocks are kept from the most lossy down until
the rest loses at most epsilon. Thresholds are sixteenths of an octave below the tile's largest
loss; bisection finds the one, where top-p rules sort. Nothing here waits for the device.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_service.kernels.block_sparse import block_sparse_attention
from prefill_service.kernels.csr import BlockCSR
from prefill_service.kernels.dot import dot

LEVELS = tl.constexpr(256)
LEVELS_PER_OCTAVE = tl.constexpr(16)
_BISECTIONS = tl.constexpr(9)  # of the range 0 to LEVELS
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


@triton.jit
def _levels(p_loss, p_bias, p_forced, o_n, blocks, largest):
    """Loss, candidate and forced flags and level of some blocks; level -1: keep in any case."""
    mask = o_n < blocks
    loss = tl.load(p_loss + o_n, mask=mask, other=0.0)
    candidate = tl.load(p_bias + o_n, mask=mask, other=float("-inf")) != float("-inf")
    forced = tl.load(p_forced + o_n, mask=mask, other=0) != 0
    # Not a number or infinite: keep the block, and the result is what dense attention gives.
    certain = (loss < float("inf")) & ~forced
    level = tl.floor(tl.log2(largest / tl.maximum(loss, 1e-38)) * LEVELS_PER_OCTAVE)
    level = tl.where(certain, tl.minimum(tl.maximum(level, 0), LEVELS - 1), -1).to(tl.int32)
    return tl.where(certain & candidate, loss, 0.0), candidate, level


@triton.jit
def threshold_kernel(p_loss, p_bias, p_forced, p_epsilon, p_kept_levels, p_largest, p_counts, tiles,
                     blocks, BLOCK_N: tl.constexpr):  # fmt: skip
    """How many levels a (KV head, tile) keeps, and how many blocks that makes."""
    i_row = tl.program_id(0)
    p_loss += i_row.to(tl.int64) * blocks
    p_bias += i_row.to(tl.int64) * blocks
    p_forced += (i_row % tiles).to(tl.int64) * blocks
    epsilon = tl.load(p_epsilon + i_row // tiles)
    o_n = tl.arange(0, BLOCK_N)
    b_largest = tl.full([BLOCK_N], 1e-38, tl.float32)
    for start in tl.range(0, blocks, BLOCK_N):
        loss, _, _ = _levels(p_loss, p_bias, p_forced, start + o_n, blocks, 1.0)
        b_largest = tl.maximum(b_largest, loss)
    largest = tl.max(b_largest, 0)
    # Keeping ``high`` levels leaves at most epsilon, keeping fewer than ``low`` leaves more.
    low = i_row * 0
    high = low + LEVELS
    for _bisection in tl.range(0, _BISECTIONS):
        middle = (low + high) // 2
        left = tl.zeros([BLOCK_N], tl.float32)
        for start in tl.range(0, blocks, BLOCK_N):
            loss, _, level = _levels(p_loss, p_bias, p_forced, start + o_n, blocks, largest)
            left += tl.where(level >= middle, loss, 0.0)
        enough = tl.sum(left, 0) <= epsilon
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    count = tl.zeros([BLOCK_N], tl.int32)
    for start in tl.range(0, blocks, BLOCK_N):
        loss, candidate, level = _levels(p_loss, p_bias, p_forced, start + o_n, blocks, largest)
        count += _kept(loss, candidate, level, high).to(tl.int32)
    tl.store(p_kept_levels + i_row, high)
    tl.store(p_largest + i_row, largest)
    tl.store(p_counts + i_row, tl.sum(count, 0))


@triton.jit
def _kept(loss, candidate, level, kept_levels):
    return candidate & ((level < 0) | ((level < kept_levels) & (loss > 0)))


@triton.jit
def fill_kernel(p_loss, p_bias, p_forced, p_kept_levels, p_largest, p_row_ptr, p_col, p_dropped,
                tiles, blocks, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write the kept blocks of a (KV head, tile) and the bias of the dropped ones."""
    i_row = tl.program_id(0)
    p_loss += i_row.to(tl.int64) * blocks
    p_bias += i_row.to(tl.int64) * blocks
    p_dropped += i_row.to(tl.int64) * blocks
    p_forced += (i_row % tiles).to(tl.int64) * blocks
    kept_levels = tl.load(p_kept_levels + i_row)
    largest = tl.load(p_largest + i_row)
    p_col += tl.load(p_row_ptr + i_row)
    done = 0
    for start in tl.range(0, blocks, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        loss, candidate, level = _levels(p_loss, p_bias, p_forced, o_n, blocks, largest)
        keep = _kept(loss, candidate, level, kept_levels)
        place = tl.cumsum(keep.to(tl.int32), 0)
        tl.store(p_col + done + place - 1, o_n, mask=keep)
        done += tl.sum(keep.to(tl.int32), 0)
        bias = tl.load(p_bias + o_n, mask=o_n < blocks, other=float("-inf"))
        tl.store(p_dropped + o_n, tl.where(keep, float("-inf"), bias), mask=o_n < blocks)


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


def select_blocks(
    loss: Tensor, bias: Tensor, forced: Tensor, epsilon: Tensor, *, capacity: int | None = None
) -> tuple[BlockCSR, Tensor]:
    """Keep the forced blocks, and of the others the most lossy until the rest loses <= epsilon.

    Thresholds are sixteenths of an octave below the largest loss that is not forced, down to 2^-16
    of it, then 0. A block whose loss is NaN or infinite is kept, one whose loss is 0 is not.

    Args:
        loss, bias: [kv_heads, tiles, blocks] float32 of ``estimate_loss``; only blocks whose bias
            is not -inf are candidates.
        forced: [tiles, blocks] bool, candidates to keep in any case.
        epsilon: [kv_heads] float32.
        capacity: of the CSR; default: room for every block.

    Returns:
        The kept blocks, and the bias with -inf for them: what ``block_sparse_attention`` takes.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    kv_heads, tiles, blocks = loss.shape
    if bias.shape != loss.shape or {loss.dtype, bias.dtype, epsilon.dtype} != {torch.float32}:
        raise ValueError(
            f"loss {list(loss.shape)} {loss.dtype}, bias {list(bias.shape)} {bias.dtype} and "
            f"epsilon {epsilon.dtype} do not fit; expected float32"
        )
    if forced.shape != (tiles, blocks) or forced.dtype != torch.bool:
        raise ValueError(f"forced is {forced.dtype} {list(forced.shape)}, expected bool "
                         f"[{tiles}, {blocks}]")  # fmt: skip
    if epsilon.shape != (kv_heads,):
        raise ValueError(f"epsilon has shape {list(epsilon.shape)}, expected [{kv_heads}]")
    rows, device = kv_heads * tiles, loss.device
    loss, bias, forced = loss.contiguous(), bias.contiguous(), forced.contiguous().view(torch.int8)
    kept_levels = torch.empty(rows, dtype=torch.int32, device=device)
    largest = torch.empty(rows, dtype=torch.float32, device=device)
    row_ptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    col = torch.empty(max(1, loss.numel() if capacity is None else capacity), dtype=torch.int32,
                      device=device)  # fmt: skip
    dropped = torch.empty_like(bias)
    if rows == 0:
        return BlockCSR(row_ptr, col), dropped
    block_n = max(16, min(256, triton.next_power_of_2(blocks)))
    threshold_kernel[(rows,)](
        loss, bias, forced, epsilon.contiguous(), kept_levels, largest, row_ptr[1:], tiles, blocks,
        BLOCK_N=block_n, enable_fp_fusion=True,
    )  # fmt: skip
    row_ptr[1:] = row_ptr[1:].cumsum(0, dtype=torch.int32)
    fill_kernel[(rows,)](
        loss, bias, forced, kept_levels, largest, row_ptr, col, dropped, tiles, blocks,
        BLOCK_N=block_n, enable_fp_fusion=True,
    )  # fmt: skip
    return BlockCSR(row_ptr, col), dropped


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


def select_reference(
    loss: Tensor, bias: Tensor, forced: Tensor, epsilon: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``select_blocks`` keeps, naively: mask and bias, both [kv_heads, tiles, blocks]."""
    candidate = bias != -torch.inf
    must = candidate & (forced | ~loss.isfinite())
    free = torch.where(candidate & ~must, loss, 0.0)
    largest = free.amax(-1, keepdim=True).clamp(min=1e-38)
    level = (-LEVELS_PER_OCTAVE.value * torch.log2(free / largest)).floor()
    level = level.clamp(0, LEVELS.value - 1)
    keep = must.clone()
    for h, t in itertools.product(*map(range, loss.shape[:2])):
        for kept_levels in range(LEVELS.value + 1):
            if free[h, t, level[h, t] >= kept_levels].sum() <= epsilon[h]:
                keep[h, t] |= (level[h, t] < kept_levels) & (free[h, t] > 0)
                break
    return keep, bias.masked_fill(keep, -torch.inf)
