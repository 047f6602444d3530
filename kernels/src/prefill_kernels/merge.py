"""Merge of partial attention results by their log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def merge_kernel(p_outs, p_lses, p_out, p_lse, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_R: tl.constexpr):  # fmt: skip
    """BLOCK_R rows of all parts; see ``merge_partials``."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    r_mask = o_row < rows
    mask = r_mask[:, None] & (o_d < HEAD_DIM)[None, :]
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for i in tl.static_range(len(p_lses)):
        m = tl.maximum(m, tl.load(p_lses[i] + o_row, mask=r_mask, other=float("-inf")))
    safe = tl.where(m == float("-inf"), 0.0, m)  # -inf minus -inf would be NaN
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i in tl.static_range(len(p_lses)):
        weight = tl.exp(tl.load(p_lses[i] + o_row, mask=r_mask, other=float("-inf")) - safe)
        b_out = tl.load(p_outs[i] + o_row[:, None] * HEAD_DIM + o_d[None, :], mask=mask, other=0.0)
        acc += b_out.to(tl.float32) * weight[:, None]
        total += weight
    divisor = tl.where(total == 0, 1.0, total)
    out = (acc / divisor[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + o_row[:, None] * HEAD_DIM + o_d[None, :], out, mask=mask)
    tl.store(p_lse + o_row, m + tl.log(divisor), mask=r_mask)


def merge_partials(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint key sets from the attention over each of them.

    Softmax over a union is the LSE-weighted mean of the softmaxes over the parts (Milakov &
    Gimelshein, arXiv 1805.02867).

    Args:
        outs: parts of [q_heads, queries, head_dim], any floating dtype.
        lses: parts of [q_heads, queries] float32, natural logarithm; -inf where a part has no key
            for a row, whose output must then be finite.

    Returns:
        out like ``outs[0]`` and lse; a row without a key in any part gives 0 and -inf.

    Raises:
        ValueError: no part, or parts of different shapes.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{len(outs)} outputs and {len(lses)} LSEs do not make parts")
    shape = outs[0].shape
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != shape or lse.shape != shape[:-1] or lse.dtype != torch.float32:
            raise ValueError(
                f"a part of {list(out.shape)} with {lse.dtype} LSE {list(lse.shape)} does not fit "
                f"{list(shape)}"
            )
    outs, lses = [x.contiguous() for x in outs], [x.contiguous() for x in lses]
    merged, total = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    rows, head_dim = total.numel(), shape[-1]
    if rows:
        block_r = 16
        merge_kernel[(triton.cdiv(rows, block_r),)](
            tuple(outs), tuple(lses), merged, total, rows, HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_R=block_r, enable_fp_fusion=True,
        )  # fmt: skip
    return merged, total


def merge_reference(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What ``merge_partials`` computes, naively and in float64."""
    lse = torch.stack(lses).double()
    total = lse.logsumexp(0)
    weights = (lse - torch.where(total == -torch.inf, 0.0, total)).exp()
    return (torch.stack(outs).double() * weights[..., None]).sum(0), total
