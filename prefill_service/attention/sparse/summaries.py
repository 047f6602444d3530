"""What is known of a key block without reading it: its mean, spread, mean value and outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from prefill_kernels.constants import largest_of_normals
from torch import Tensor

from prefill_service.attention_shape import SUMMARY_VECTORS, accumulation_dtype


@dataclass(slots=True)
class BlockSummaries:
    """Statistics of complete key blocks, float32 (or float64).

    Attributes:
        k_mean: [kv_heads, blocks, head_dim] mean key.
        k_var: [kv_heads, blocks, head_dim] variance of the keys, per dimension (diagonal of their
            covariance).
        v_mean: [kv_heads, blocks, head_dim] mean value.
        k_far: [kv_heads, blocks, head_dim] mean of the block's outliers, which mean and variance
            would hide: the key farthest from the mean, and those more than half as far that way.
        far_count: [kv_heads, blocks] how many these are.
    """

    k_mean: Tensor
    k_var: Tensor
    v_mean: Tensor
    k_far: Tensor
    far_count: Tensor

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return self.k_mean.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Each statistic, in the order above."""
        return self.k_mean, self.k_var, self.v_mean, self.k_far, self.far_count

    def of_heads(self, index: Tensor) -> BlockSummaries:
        """The part of the KV heads at ``index``."""
        return BlockSummaries(*(part[index] for part in self.parts))

    def first(self, blocks: int) -> BlockSummaries:
        """The part of the first ``blocks`` blocks (views)."""
        return BlockSummaries(*(part[:, :blocks] for part in self.parts))

    def of_blocks(self, index: Tensor) -> BlockSummaries:
        """The part of the blocks at ``index``."""
        return BlockSummaries(*(part[:, index] for part in self.parts))

    def scatter(self, index: Tensor, other: BlockSummaries) -> None:
        """Overwrite the blocks at ``index``."""
        for part, new in zip(self.parts, other.parts, strict=True):
            part[:, index] = new

    def put(self, start: int, other: BlockSummaries) -> None:
        """Overwrite the blocks from ``start`` on."""
        for part, new in zip(self.parts, other.parts, strict=True):
            part[:, start : start + other.blocks] = new

    def pack(self) -> Tensor:
        """[kv_heads, blocks, summary_width(head_dim)], to be sent."""
        return torch.cat([*self.parts[:-1], self.far_count[..., None]], -1)

    @classmethod
    def unpack(cls, packed: Tensor) -> BlockSummaries:
        """The reverse of ``pack`` (views)."""
        mean, var, value, far = packed[..., :-1].chunk(SUMMARY_VECTORS, -1)
        return cls(k_mean=mean, k_var=var, v_mean=value, k_far=far, far_count=packed[..., -1])


def empty_summaries(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> BlockSummaries:
    """Zeros for [kv_heads, blocks, head_dim] blocks of keys of ``dtype``."""
    work = accumulation_dtype(dtype)
    shapes = [shape] * SUMMARY_VECTORS + [shape[:2]]
    return BlockSummaries(*(torch.zeros(s, dtype=work, device=device) for s in shapes))


def summarize(k: Tensor, v: Tensor, block_tokens: int) -> BlockSummaries:
    """Summaries of the blocks of ``k`` and ``v``.

    Args:
        k, v: [kv_heads, tokens, head_dim]; tokens a multiple of ``block_tokens``.

    Raises:
        ValueError: an incomplete block.
    """
    kv_heads, tokens, head_dim = k.shape
    if tokens % block_tokens:
        raise ValueError(f"{tokens} tokens are no whole number of blocks of {block_tokens}")
    if k.is_cuda:
        from prefill_kernels import summarize_blocks

        return BlockSummaries(*summarize_blocks(k, v, block_tokens=block_tokens))
    work = accumulation_dtype(k.dtype)
    shape = (kv_heads, tokens // block_tokens, block_tokens, head_dim)
    kb = k.to(work).reshape(shape)
    mean = kb.mean(2)
    centred = kb - mean[:, :, None]
    squared = centred.square()
    distance = squared.sum(-1)  # [kv_heads, blocks, block_tokens]
    farthest = distance.argmax(2, keepdim=True)
    index = farthest[..., None].expand(-1, -1, 1, head_dim)
    along = centred @ centred.gather(2, index).mT  # [kv_heads, blocks, block_tokens, 1]
    # Of equal keys none is far; the farthest itself counts in any case.
    outliers = (along[..., 0] > 0.5 * distance.amax(2, keepdim=True)).to(work)
    outliers.scatter_(2, farthest, 1.0)
    count = outliers.sum(2)  # [kv_heads, blocks]
    k_far = (outliers[:, :, None] @ kb).squeeze(2) / count[..., None]
    return BlockSummaries(
        k_mean=mean,
        k_var=squared.mean(2),
        v_mean=v.to(work).reshape(shape).mean(2),
        k_far=k_far,
        far_count=count,
    )


def lift(variance: Tensor, block_tokens: int) -> Tensor:
    """By how much the log-mean-exp of ``block_tokens`` scores exceeds their mean.

    Half the variance while the scores are many enough to sample the tail of a normal
    distribution; beyond that the largest of them rules, and growth is linear in the standard
    deviation (the random energy model; Derrida, Phys. Rev. B 24, 2613, 1981).
    """
    edge = largest_of_normals(block_tokens)
    frozen = edge * torch.sqrt(variance) - 0.5 * edge**2
    return torch.where(variance <= edge**2, 0.5 * variance, frozen)


def misplaced_share(variance: Tensor) -> Tensor:
    """Share of a block's mass that its summary misplaces, given the variance of its scores.

    Total variation distance between normally distributed scores' softmax and the uniform
    distribution, ``erf(s / sqrt(8))``, in Polya's approximation (0.007 off at most).
    """
    return torch.sqrt(-torch.expm1(variance / (-2 * math.pi)))
