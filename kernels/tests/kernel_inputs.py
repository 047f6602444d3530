"""Inputs whose blocks differ in what their summaries would misplace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from prefill_kernels import Summaries, Tiling
from prefill_kernels.reference import summarize_blocks_reference
from torch import Tensor


@dataclass(frozen=True)
class Clustered:
    """Keys of two KV heads in clusters of a few blocks with an outlier here and there."""

    group: int = 4  # query heads per KV head
    queries: int = 70
    q_offset: int = 90
    head_dim: int = 64
    block: int = 16
    tile: int = 32
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.block, self.tile, self.q_offset)

    def build(self) -> tuple[Tensor, Tensor, Summaries]:
        """Queries, keys, and the summaries of all blocks, rounded as the kernel will round them."""
        torch.manual_seed(self.seed)
        keys = self.q_offset + self.queries
        shape = (2, keys // 48 + 1, self.head_dim)
        centre = torch.randn(shape).repeat_interleave(48, 1)[:, :keys]
        k = centre + torch.rand(2, keys, 1) * torch.randn(2, keys, self.head_dim)
        k[:, ::61] *= 3
        q = torch.randn(2 * self.group, self.queries, self.head_dim).to(self.dtype)
        k = k.to(self.dtype)
        exact = summarize_blocks_reference(k, k, block_tokens=self.block)
        summaries = Summaries(
            k_mean=exact.k_mean.to(self.dtype).float(),
            k_var=exact.k_var.float(),
            v_mean=exact.v_mean.float(),
            k_far=exact.k_far.to(self.dtype).float(),
            far_count=exact.far_count.float(),
        )
        return q, k, summaries


def random_losses(tiles: int = 5, blocks: int = 70, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and biases [3, tiles, blocks] and forced blocks; the first tile has no candidate."""
    torch.manual_seed(seed)
    loss = torch.rand(3, tiles, blocks) ** 8 * torch.rand(3, tiles, 1)
    bias = torch.randn_like(loss)
    for t in range(tiles):
        loss[:, t, t * 17 :] = 0
        bias[:, t, t * 17 :] = -torch.inf
    forced = (torch.rand(tiles, blocks) < 0.1) & (bias[0] != -torch.inf)
    return loss, bias, forced
