"""Attention over block summaries: what selection reads, and what dropped blocks contribute.

Every row attends to all candidate blocks through their mean keys, with its local region as one
more block of known mass. Selection reads the shares; of the blocks that were dropped, they are
also the weights of the mean values, so that second-order compensation costs one more product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prefill_kernels.cpu.matmul import matmul_nt
from torch import Tensor

from prefill_service.attention.dense import Partial

_ALIGNED = 16  # row lengths that vector units and BLAS like
TINY_SHARE = 1e-30
"""Shares below this are next to what float32 loses: they no longer tell what the rest is."""


@dataclass(frozen=True, slots=True)
class SummaryAttention:
    """One softmax over block summaries and the local region.

    Attributes:
        shares: [kv_heads, tiles, rows, >= blocks + 1]; the column after the last block is the
            local region's, further ones are 0.
        lse: [kv_heads, tiles, rows] natural log-sum-exp over all of them.
    """

    shares: Tensor
    lse: Tensor


def attend_summaries(
    rows: Tensor, local_lse: Tensor, k_mean: Tensor, *, bias: Tensor, scale: float
) -> SummaryAttention:
    """Shares of every block and of the local region.

    Args:
        rows: [kv_heads, tiles, rows, head_dim].
        local_lse: [kv_heads, tiles, rows], over the local region.
        k_mean: [kv_heads, blocks, head_dim].
        bias: [kv_heads, tiles, blocks] added to the blocks' logits; -inf hides one.
        scale: factor on the scores.
    """
    scores = _logits(rows, local_lse, k_mean, bias=bias, scale=scale)
    shares = torch.softmax(scores, -1, out=scores)
    local = shares[..., k_mean.shape[1]]
    if local.numel() and local.min() < TINY_SHARE:
        # A local region that is lost in the rest cannot tell how much the rest is.
        logits = _logits(rows, local_lse, k_mean, bias=bias, scale=scale)
        lse = torch.logsumexp(logits, -1)
    else:
        lse = local_lse - torch.log(local)
    return SummaryAttention(shares, lse)


def _logits(
    rows: Tensor, local_lse: Tensor, k_mean: Tensor, *, bias: Tensor, scale: float
) -> Tensor:
    """[kv_heads, tiles, rows, >= blocks + 1], as ``SummaryAttention.shares`` before the softmax."""
    kv_heads, count, packed, head_dim = rows.shape
    blocks = k_mean.shape[1]
    width = -(-(blocks + 1) // _ALIGNED) * _ALIGNED
    scores = rows.new_empty(kv_heads, count, packed, width)
    for head in range(kv_heads):
        logits = matmul_nt(rows[head].reshape(-1, head_dim), k_mean[head] * scale)
        torch.add(
            logits.view(count, packed, blocks), bias[head, :, None], out=scores[head, ..., :blocks]
        )
    if not torch.isfinite(k_mean.sum()):  # NaN less infinity is NaN: hide what the bias hides
        hidden = (bias == -torch.inf)[:, :, None]
        scores[..., :blocks].masked_fill_(hidden, -torch.inf)
    scores[..., blocks] = local_lse
    scores[..., blocks + 1 :] = -torch.inf
    return scores


def merge_with_summaries(
    local: Partial, kept: Partial, attention: SummaryAttention, *, v_mean: Tensor, dropped: Tensor
) -> Partial:
    """One softmax over the local region, the kept blocks and the dropped ones' summaries.

    Args:
        local, kept: of [kv_heads, tiles, rows, ...].
        attention: over all summaries, kept blocks included.
        v_mean: [kv_heads, blocks, head_dim].
        dropped: [kv_heads, tiles, blocks] bool, blocks that their summary stands for.
    """
    kv_heads, count, packed, head_dim = local.out.shape
    blocks = v_mean.shape[1]
    # The last columns count the dropped mass: values of 1. What is no block weighs nothing.
    width = attention.shares.shape[-1]
    values = v_mean.new_zeros(kv_heads, count, width, head_dim + _ALIGNED)
    values[..., :blocks, :head_dim] = torch.where(dropped[..., None], v_mean[:, None], 0.0)
    values[..., :blocks, head_dim] = dropped
    of_tile = zip(attention.shares.flatten(0, 1), values.flatten(0, 1), strict=True)
    products = [matmul_nt(shares, value.T) for shares, value in of_tile]
    summed = torch.stack(products).view(kv_heads, count, packed, -1)
    kept_log = kept.lse - attention.lse
    top = kept_log.clamp(min=0)  # an estimate may be far too low: scale by what is larger
    scaled = torch.exp(-top)
    of_local = attention.shares[..., blocks] * scaled
    of_kept = torch.exp(kept_log - top)
    total = of_local + summed[..., head_dim] * scaled + of_kept
    out = summed[..., :head_dim] * (scaled / total)[..., None]
    out.addcmul_(local.out.to(out.dtype), (of_local / total)[..., None])
    out.addcmul_(kept.out.to(out.dtype), (of_kept / total)[..., None])
    return Partial(out.to(local.out.dtype), attention.lse + top + torch.log(total))
