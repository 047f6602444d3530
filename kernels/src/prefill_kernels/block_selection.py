"""Block selection on the device: threshold the blocks' losses, build the block-CSR.

Blocks are kept from the most lossy down (``estimate_block_loss``) until the rest loses at most
epsilon. Thresholds are sixteenths of an octave below the tile's largest loss; bisection finds the
one, where top-p rules sort. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefill_kernels.constants import LEVELS, LEVELS_PER_OCTAVE
from prefill_kernels.csr import BlockCSR

_LEVELS = tl.constexpr(LEVELS)
_PER_OCTAVE = tl.constexpr(LEVELS_PER_OCTAVE)
_BISECTIONS = tl.constexpr(9)  # of the range 0 to _LEVELS


@triton.jit
def _levels(p_loss, p_bias, p_forced, o_n, blocks, largest):
    """Loss, whether it is a candidate, and level of the blocks at o_n [N].

    Level l means a loss of ``largest`` / 2^((l + 1) / 16) to ``largest`` / 2^(l / 16); -1: keep in
    any case, and count no loss.
    """
    mask = o_n < blocks
    loss = tl.load(p_loss + o_n, mask=mask, other=0.0)
    candidate = tl.load(p_bias + o_n, mask=mask, other=float("-inf")) != float("-inf")
    forced = tl.load(p_forced + o_n, mask=mask, other=0) != 0
    # Not a number or infinite: keep the block, and the result is what dense attention gives.
    certain = (loss < float("inf")) & ~forced
    level = tl.floor(tl.log2(largest / tl.maximum(loss, 1e-38)) * _PER_OCTAVE)
    level = tl.where(certain, tl.minimum(tl.maximum(level, 0), _LEVELS - 1), -1).to(tl.int32)
    return tl.where(certain & candidate, loss, 0.0), candidate, level


@triton.jit
def _kept(loss, candidate, level, kept_levels):
    """[N] whether a block is kept where the first ``kept_levels`` levels are."""
    return candidate & ((level < 0) | ((level < kept_levels) & (loss > 0)))


@triton.jit
def threshold_kernel(
    p_loss,
    p_bias,
    p_forced,
    p_epsilon,
    p_kept_levels,
    p_largest,
    p_counts,
    tiles,
    blocks,
    BLOCK_N: tl.constexpr,
):
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
    high = low + _LEVELS
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
def fill_kernel(
    p_loss,
    p_bias,
    p_forced,
    p_kept_levels,
    p_largest,
    p_row_ptr,
    p_col,
    p_dropped,
    tiles,
    blocks,
    BLOCK_N: tl.constexpr,
):
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


def select_blocks(
    loss: Tensor, bias: Tensor, forced: Tensor, epsilon: Tensor, *, capacity: int | None = None
) -> tuple[BlockCSR, Tensor]:
    """Keep the forced blocks, and of the others the most lossy until the rest loses <= epsilon.

    Thresholds are sixteenths of an octave below the largest loss that is not forced, down to 2^-16
    of it, then 0. A block whose loss is NaN or infinite is kept, one whose loss is 0 is not.

    Args:
        loss, bias: [kv_heads, tiles, blocks] float32 of ``estimate_block_loss``; only blocks
            whose bias is not -inf are candidates.
        forced: [tiles, blocks] bool, candidates to keep in any case.
        epsilon: [kv_heads] float32.
        capacity: of the CSR; default: room for every block.

    Returns:
        The kept blocks, and the bias with -inf for them: that of ``DroppedBlocks``.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check(loss, bias, forced, epsilon)
    kv_heads, tiles, blocks = loss.shape
    rows = kv_heads * tiles
    device = loss.device
    loss = loss.contiguous()
    bias = bias.contiguous()
    forced = forced.contiguous().view(torch.int8)
    kept_levels = torch.empty(rows, dtype=torch.int32, device=device)
    largest = torch.empty(rows, dtype=torch.float32, device=device)
    row_ptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    capacity = loss.numel() if capacity is None else capacity
    col = torch.empty(max(1, capacity), dtype=torch.int32, device=device)
    dropped = torch.empty_like(bias)
    if rows == 0:
        return BlockCSR(row_ptr, col), dropped
    options = {
        "BLOCK_N": max(16, min(256, triton.next_power_of_2(blocks))),
        "enable_fp_fusion": True,
    }
    threshold_kernel[(rows,)](
        loss,
        bias,
        forced,
        epsilon.contiguous(),
        kept_levels,
        largest,
        row_ptr[1:],
        tiles,
        blocks,
        **options,
    )
    row_ptr[1:] = row_ptr[1:].cumsum(0, dtype=torch.int32)  # the counts become ends of rows
    fill_kernel[(rows,)](
        loss,
        bias,
        forced,
        kept_levels,
        largest,
        row_ptr,
        col,
        dropped,
        tiles,
        blocks,
        **options,
    )
    return BlockCSR(row_ptr, col), dropped


def _check(loss: Tensor, bias: Tensor, forced: Tensor, epsilon: Tensor) -> None:
    kv_heads, tiles, blocks = loss.shape
    if bias.shape != loss.shape or {loss.dtype, bias.dtype, epsilon.dtype} != {torch.float32}:
        raise ValueError(
            f"loss {list(loss.shape)} {loss.dtype}, bias {list(bias.shape)} {bias.dtype} and "
            f"epsilon {epsilon.dtype} do not fit; expected float32"
        )
    if forced.shape != (tiles, blocks) or forced.dtype != torch.bool:
        raise ValueError(
            f"forced is {forced.dtype} {list(forced.shape)}, expected bool [{tiles}, {blocks}]"
        )
    if epsilon.shape != (kv_heads,):
        raise ValueError(f"epsilon has shape {list(epsilon.shape)}, expected [{kv_heads}]")
