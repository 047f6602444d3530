"""What the kernels take and return beside plain tensors; no Triton here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Tiling:
    """How queries are cut into tiles and keys into blocks, and where the queries stand.

    Query i stands at position ``q_offset + i``. Tile t holds ``tile_tokens`` queries, from position
    p0 = ``q_offset + tile_tokens * t`` on; its local region is [floor(p0 / B) * B, own position]
    with B = ``block_tokens``. All blocks before it are candidates: they can be kept or dropped.

    Attributes:
        block_tokens: keys of a block, a power of two, 16 or more.
        tile_tokens: queries of a tile; the last tile may be shorter.
        q_offset: position of the first query.
        block_table: [blocks] or [kv_heads, blocks] int32, the page of each block. With it keys and
            values are pages [pages, block_tokens, kv_heads, head_dim], without it
            [kv_heads, keys, head_dim].

    Raises:
        ValueError: a number out of its range.
    """

    block_tokens: int
    tile_tokens: int
    q_offset: int = 0
    block_table: Tensor | None = None

    def __post_init__(self) -> None:
        if self.block_tokens < 16 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(
                f"block_tokens = {self.block_tokens} is not a power of two of 16 or more"
            )
        if self.tile_tokens < 1 or self.q_offset < 0:
            raise ValueError(
                f"tile_tokens = {self.tile_tokens} must be >= 1, q_offset = {self.q_offset} >= 0"
            )

    def num_tiles(self, queries: int) -> int:
        """How many tiles ``queries`` queries make."""
        return -(-queries // self.tile_tokens)

    def candidates(self, tile: int) -> int:
        """How many blocks lie before the local region of a tile."""
        return (self.q_offset + tile * self.tile_tokens) // self.block_tokens


class Summaries(NamedTuple):
    """Statistics of complete key blocks, float32.

    Attributes:
        k_mean: [kv_heads, blocks, head_dim] mean key.
        k_var: [kv_heads, blocks, head_dim] population variance of the keys, per dimension.
        v_mean: [kv_heads, blocks, head_dim] mean value.
        k_far: [kv_heads, blocks, head_dim] mean of the block's outliers: the key farthest from the
            mean (the first of equals), and those more than half as far in its direction.
        far_count: [kv_heads, blocks] number of the outliers.
    """

    k_mean: Tensor
    k_var: Tensor
    v_mean: Tensor
    k_far: Tensor
    far_count: Tensor


class BlockLoss(NamedTuple):
    """What each block's summary would misplace if it stood for the block.

    Attributes:
        loss: [kv_heads, tiles, blocks] float32, attention mass, mean over rows of the tile; 0 where
            a block is no candidate of the tile.
        peak: [kv_heads, tiles, blocks] float32, the largest value that either part of the loss has
            in any row; 0 likewise.
        bias: [kv_heads, tiles, blocks] float32, the logit to add to the score of the summary's
            mean key; -inf where a block is no candidate.
    """

    loss: Tensor
    peak: Tensor
    bias: Tensor


class DroppedBlocks(NamedTuple):
    """Summaries that stand for dropped blocks, each as one key with an additive logit.

    Attributes:
        k_mean, v_mean: [kv_heads, blocks, head_dim].
        bias: [kv_heads, tiles, blocks] float32, added to the score of the mean key; -inf leaves
            the summary out. Only a tile's candidates are read; those of the last tile must exist.
    """

    k_mean: Tensor
    v_mean: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class AttentionOptions:
    """What a call of ``block_sparse_attention`` may change.

    Attributes:
        scale: factor on the scores, positive; default: ``head_dim ** -0.5``.
        local: attend the local region. Without it a row may see no key at all.
        order: [kv_heads * tiles] int32, the order in which rows of the CSR are started
            (``longest_first``); default: per KV head from the last tile, which sees most keys, to
            the first.
        skip_threshold: in (0, 1); leaves out a key tile of a kept block if its largest score lies
            so far below every row's running maximum that exp(difference) < threshold (BLASST,
            arXiv 2512.12087). Such keys are missing from the log-sum-exp, too.
        config: the ``triton.Config`` to launch. Default: the best measured for this kind of call,
            found at its first call with 8192 keys or more and cached on disk; below, a likely one.

    Raises:
        ValueError: a number out of its range.
    """

    scale: float | None = None
    local: bool = True
    order: Tensor | None = None
    skip_threshold: float | None = None
    config: Any = None

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"scale = {self.scale} is not accepted; expected a positive number")
        if self.skip_threshold is not None and not 0 < self.skip_threshold < 1:
            raise ValueError(
                f"skip_threshold = {self.skip_threshold} is not accepted; expected 0 to 1"
            )
