"""What the GPU benchmark computes: the last chunk of a prompt over random kept blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from prefill_kernels import (
    AttentionOptions,
    BlockCSR,
    DroppedBlocks,
    Summaries,
    Tiling,
    block_sparse_attention,
    estimate_block_loss,
    select_blocks,
    summarize_blocks,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from prefill_service.attention.sparse.selection import force_keep

CHUNK = 16384
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Shape:
    """A chunk of at most ``chunk`` queries at the end of ``tokens`` keys, in tiles and blocks."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int = 128
    block: int = 128
    tile: int = 128
    chunk: int = CHUNK

    @property
    def queries(self) -> int:
        return min(self.tokens, self.chunk)

    @property
    def q_offset(self) -> int:
        return self.tokens - self.queries

    @property
    def tiles(self) -> int:
        return -(-self.queries // self.tile)

    def candidates(self) -> Tensor:
        """[tiles] complete blocks before each tile's first query."""
        return (self.q_offset + torch.arange(self.tiles) * self.tile) // self.block

    def local_pairs(self) -> int:
        """(query, key) pairs of one query head inside the local regions."""
        own = self.q_offset + torch.arange(self.queries)
        start = self.candidates().repeat_interleave(self.tile)[: self.queries] * self.block
        return int((own - start + 1).sum())

    def causal_pairs(self) -> int:
        return self.queries * self.q_offset + self.queries * (self.queries + 1) // 2

    def flops(self, pairs: int) -> int:
        """Both matrix products over some (query, key) pairs of all query heads together."""
        return 4 * self.head_dim * pairs

    def tiling(self) -> Tiling:
        return Tiling(block_tokens=self.block, tile_tokens=self.tile, q_offset=self.q_offset)


@dataclass(frozen=True)
class Rows:
    """Kept blocks. keep: [kv_heads, tiles, blocks] bool; kept_pairs: over all query heads."""

    keep: Tensor
    csr: BlockCSR
    kept_pairs: int


class Problem:
    """Random inputs of one shape, and the contestants over them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        random = {"generator": generator, "dtype": dtype, "device": device}
        self.q = torch.randn(shape.q_heads, shape.queries, shape.head_dim, **random)  # type: ignore[call-overload]
        kv = torch.randn(shape.tokens, 2, shape.kv_heads, shape.head_dim, **random)  # type: ignore[call-overload]
        self.k = kv[:, 0].transpose(0, 1)
        self.v = kv[:, 1].transpose(0, 1)

    @cached_property
    def summaries(self) -> Summaries:
        return summarize_blocks(self.k, self.v, block_tokens=self.shape.block)

    def rows(self, density: float) -> Rows:
        """Every candidate block is kept with the same probability: neighbours share little."""
        shape = self.shape
        blocks = shape.tokens // shape.block
        generator = torch.Generator(self.device).manual_seed(1)
        dice = torch.rand(
            shape.kv_heads, shape.tiles, blocks, generator=generator, device=self.device
        )
        candidate = torch.arange(blocks) < shape.candidates()[:, None]
        keep = (dice < density) & candidate.to(self.device)
        counts = keep.sum(-1, dtype=torch.int32)  # [kv_heads, tiles]
        row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=self.device)
        torch.cumsum(counts.flatten(), 0, out=row_ptr[1:])
        csr = BlockCSR(row_ptr, keep.nonzero()[:, -1].to(torch.int32))
        length = torch.full((shape.tiles,), shape.tile)
        length[-1] = shape.queries - (shape.tiles - 1) * shape.tile
        pairs = int((counts.cpu() * length).sum()) * shape.block * shape.q_heads // shape.kv_heads
        return Rows(keep, csr, pairs + shape.local_pairs() * shape.q_heads)

    def ours(
        self,
        rows: Rows,
        *,
        dropped: DroppedBlocks | None = None,
        options: AttentionOptions | None = None,
    ) -> Callable[[], Tensor]:
        """Attention to kept blocks and local regions, and to summaries where there are some."""
        tiling = self.shape.tiling()
        return lambda: block_sparse_attention(
            self.q, self.k, self.v, rows.csr, tiling=tiling, dropped=dropped, options=options
        )[0]

    def compensated(self, rows: Rows) -> Callable[[], Tensor]:
        """The same with the summaries of all dropped blocks."""
        bias = torch.zeros(rows.keep.shape, device=self.device).masked_fill_(rows.keep, -torch.inf)
        k_mean = self.summaries.k_mean.to(self.q.dtype)
        v_mean = self.summaries.v_mean.to(self.q.dtype)
        return self.ours(rows, dropped=DroppedBlocks(k_mean, v_mean, bias))

    def selection(self) -> Callable[[], object]:
        """The chunk's own summaries, the estimate over all blocks, and the choice."""
        shape = self.shape
        summaries = self.summaries
        own = slice(shape.q_offset, None)
        blocks = summaries.k_mean.shape[1]
        forced = torch.zeros(shape.tiles, blocks, dtype=torch.bool, device=self.device)
        epsilon = torch.full((shape.kv_heads,), 0.1, device=self.device)

        def select() -> object:
            summarize_blocks(self.k[:, own], self.v[:, own], block_tokens=shape.block)
            loss, peak, bias = estimate_block_loss(self.q, self.k, summaries, tiling=shape.tiling())
            return select_blocks(force_keep(loss, peak, epsilon / 2), bias, forced, epsilon)

        return select

    def dense(self, backend: str) -> tuple[Callable[[], Tensor], int]:
        """torch's SDPA, and the pairs that it computes.

        Causal where the chunk is the whole prompt. Otherwise the full rectangle without a mask,
        which suits a kernel best: its rate is an upper bound.
        """
        shape = self.shape
        causal = shape.q_offset == 0
        pairs = shape.causal_pairs() if causal else shape.queries * shape.tokens
        group = shape.q_heads // shape.kv_heads
        q = self.q[None]
        k, v = (x.repeat_interleave(group, 0)[None] for x in (self.k, self.v))

        def attend() -> Tensor:
            with sdpa_kernel(BACKENDS[backend] if q.is_cuda else SDPBackend.MATH):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        return attend, pairs * shape.q_heads
