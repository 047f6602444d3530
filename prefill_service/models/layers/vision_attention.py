"""The vision tower's own attention and patch embedding, as few and large operations.

transformers' towers attend to one frame (or window) after the other unless a flash kernel is named,
and embed patches by a 3-D convolution whose kernel covers its whole input. Here frames of equal
length are one batched call, and the embedding is the matrix product that it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from prefill_kernels.cpu.attention import attend_rows
from prefill_kernels.cpu.matmul import uses_onednn
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

VISION_ATTENTION = "prefill_service_flash_varlen"
"""Under a name with "flash" in it transformers hands over all frames at once, and their borders."""

_LONG = 384
"""Tokens from which on frames are long enough for ``attend_rows``, a call for each on CPUs."""


def varlen_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_mask: Any,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """``AttentionInterface`` entry: full attention inside each run of tokens.

    Args:
        query, key, value: [1, heads, tokens, head_dim].
        cu_seq_lens_q: [runs + 1] borders of the runs.

    Returns:
        [1, tokens, heads, head_dim].
    """
    borders = cu_seq_lens_q.tolist()
    lengths = [end - start for start, end in pairwise(borders)]
    q = query[0]
    k = key[0]
    v = value[0]  # [heads, tokens, head_dim]
    if len(set(lengths)) == 1:
        shape = (q.shape[0], len(lengths), lengths[0], q.shape[2])
        q, k, v = (x.view(shape) for x in (q, k, v))
        return _batched(q, k, v, scaling).flatten(0, 1)[None], None
    result = q.new_empty(q.shape[1], len(q), q.shape[2])
    for length in set(lengths) - {0}:
        starts = [s for s, n in zip(borders[:-1], lengths, strict=True) if n == length]
        rows = torch.tensor(starts, device=q.device)[:, None] + torch.arange(
            length, device=q.device
        )  # [runs, length]
        result[rows] = _batched(q[:, rows], k[:, rows], v[:, rows], scaling)
    return result[None], None


def _batched(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """[heads, runs, length, head_dim] each to [runs, length, heads, head_dim]."""
    if q.shape[2] >= _LONG and uses_onednn(q):
        out, _ = attend_rows(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scaling)
        return out.view(q.shape).permute(1, 2, 0, 3)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2)


class PatchProduct(nn.Module):
    """A convolution over patches of exactly its kernel's size, as a product.

    Args:
        conv: with kernel and stride alike.

    Raises:
        ValueError: another kind of convolution.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        plain = conv.padding == (0, 0, 0) and conv.dilation == (1, 1, 1) and conv.groups == 1
        if conv.kernel_size != conv.stride or not plain:
            raise ValueError(f"{conv} is no product over whole patches")
        self.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
        self.bias = conv.bias

    def forward(self, patches: Tensor) -> Tensor:
        """[patches, channels, time, height, width] to [patches, width of the tower]."""
        return linear(patches.flatten(1), self.weight, self.bias)
