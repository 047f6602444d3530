"""Block-sparse attention on CPU: gather a tile's kept blocks, then attend to all that was gathered.

The rows of one (KV head, tile) are its group's heads times its tokens, and they share one list of
keys. Rows with equally many kept blocks go through one batched call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from prefill_kernels.cpu.attention import attend_rows
from prefill_kernels.cpu.threads import spread
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.dense import Partial
from prefill_service.attention.sparse.tiles import Tiles

_BATCH_FLOATS = 1 << 20


@dataclass(slots=True)
class GatherBuffers:
    """Scratch memory that calls of one process share; grows to the largest request."""

    _held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised memory; valid until the next request of that name."""
        numel = 1
        for size in shape:
            numel *= size
        held = self._held.get(name)
        if held is None or held.numel() < numel or held.dtype != like.dtype:
            held = self._held[name] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return held[:numel].view(shape)


def local_attention(
    rows: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float, buffers: GatherBuffers
) -> Partial:
    """Causal attention of every tile over its local region.

    Args:
        rows: [kv_heads, tiles, group * tile_tokens, head_dim] packed queries.
        k, v: [kv_heads, keys, head_dim], at least ``tiles.keys`` keys.

    Returns:
        Partial of [kv_heads, tiles, group * tile_tokens, ...]; nobody reads the rows that hold
        no query.

    Raises:
        ValueError: a tile that is no whole number of blocks.
    """
    kv_heads, count, packed, head_dim = rows.shape
    tile, block = tiles.tile_tokens, tiles.block_tokens
    if tile % block:
        raise ValueError(f"a tile of {tile} tokens is no whole number of blocks of {block}")
    before = tiles.q_offset % block  # keys of the local region before the tile's first query
    length = before + tile
    first = tiles.q_offset - before
    # Keys after the last query do not exist yet; queries that do exist are masked from them.
    whole = tiles.queries // tile
    shape = (kv_heads * count, length, head_dim)
    parts = []
    for name, x in (("k0", k), ("v0", v)):
        part = buffers.get(name, shape, x).view(kv_heads, count, length, head_dim)
        if whole:
            windows = x[:, first : first + before + whole * tile].unfold(1, length, tile)
            part[:, :whole] = windows.transpose(2, 3)  # unfold puts the window last
        if whole < count:
            rest = x[:, first + whole * tile : tiles.keys]
            part[:, whole, : rest.shape[1]] = rest
            part[:, whole, rest.shape[1] :] = 0
        parts.append(part.view(shape))
    hidden = torch.ones(tile, tile, dtype=torch.bool).triu(1).repeat(packed // tile, 1)
    out, lse = attend_rows(rows.flatten(0, 1), parts[0], parts[1], scale, hidden)
    return Partial(out.reshape(rows.shape), lse.reshape(rows.shape[:3]))


def kept_attention(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    csr: BlockCSR,
    tiles: Tiles,
    scale: float,
    buffers: GatherBuffers,
) -> Partial:
    """Attention of every tile over its kept blocks.

    Args:
        rows: [kv_heads, tiles, group * tile_tokens, head_dim] packed queries.
        k, v: [kv_heads, keys, head_dim] with contiguous head_dim.
        csr: kept blocks.

    Returns:
        Partial of [kv_heads, tiles, group * tile_tokens, ...]; 0 and -inf for a tile that keeps
        nothing.
    """
    work = _Work(rows.flatten(0, 1), k, v, csr, tiles, scale, buffers)
    lse_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.empty_like(rows).flatten(0, 1)
    lse = rows.new_full(out.shape[:2], -torch.inf, dtype=lse_dtype)

    def attend(piece: tuple[int, list[int]], worker: int) -> None:
        kept, batch = piece
        index = slice(batch[0], batch[0] + 1) if len(batch) == 1 else batch  # a view, if it can be
        if kept:
            out[index], lse[index] = work.attend(kept, batch, index, worker)
        else:
            out[index] = 0

    spread(attend, list(work.batches()))
    return Partial(out.view(rows.shape), lse.view(rows.shape[:3]))


@dataclass(slots=True)
class _Work:
    """The inputs of one ``kept_attention``; a row of it is ``kv_head * tiles + tile``."""

    rows: Tensor  # [kv_heads * tiles, packed, head_dim]
    k: Tensor
    v: Tensor
    csr: BlockCSR
    tiles: Tiles
    scale: float
    buffers: GatherBuffers
    starts: list[int] = field(init=False)
    k_blocks: list[Tensor] = field(init=False)  # per KV head [blocks, block_tokens, head_dim]
    v_blocks: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = self.csr.row_ptr.tolist()
        whole = self.k.shape[1] // self.tiles.block_tokens * self.tiles.block_tokens
        shape = (-1, self.tiles.block_tokens, self.k.shape[-1])
        self.k_blocks = [head[:whole].view(shape) for head in self.k]
        self.v_blocks = [head[:whole].view(shape) for head in self.v]

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """Kept blocks, and rows that keep so many; bounded memory."""
        by_length: dict[int, list[int]] = {}
        for row, (start, end) in enumerate(pairwise(self.starts)):
            by_length.setdefault(end - start, []).append(row)
        for kept, rows in by_length.items():
            floats = max(1, kept) * self.tiles.block_tokens * self.k.shape[-1]
            size = max(1, _BATCH_FLOATS // floats)
            for i in range(0, len(rows), size):
                yield kept, rows[i : i + size]

    def attend(
        self, kept: int, batch: list[int], index: list[int] | slice, worker: int
    ) -> tuple[Tensor, Tensor]:
        """Output [batch, rows, head_dim] and LSE [batch, rows]; ``index`` is ``batch``."""
        block, head_dim = self.tiles.block_tokens, self.k.shape[-1]
        shape = (len(batch), kept * block, head_dim)
        keys = self.buffers.get(f"k{worker}", shape, self.k)
        values = self.buffers.get(f"v{worker}", shape, self.v)
        for i, row in enumerate(batch):
            head = row // self.tiles.count
            col = self.csr.col[self.starts[row] : self.starts[row + 1]]
            into = (kept, block, head_dim)
            torch.index_select(self.k_blocks[head], 0, col, out=keys[i].view(into))
            torch.index_select(self.v_blocks[head], 0, col, out=values[i].view(into))
        return attend_rows(self.rows[index], keys, values, self.scale)
