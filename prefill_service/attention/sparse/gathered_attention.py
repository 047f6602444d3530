"""Block-sparse attention on CPU: gather a tile's kept blocks, then attend to all that was gathered.

The rows of one (KV head, tile) are its group's heads times its tokens, and they share one list of
keys. Rows with equally many kept blocks go through one batched call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from prefill_kernels.cpu.attention import attend_rows
from prefill_kernels.cpu.threads import parallel_for
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.dense import Partial
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import accumulation_dtype

_BATCH_FLOATS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTiles:
    """Queries packed by tile, and the keys and values that they attend to.

    Attributes:
        rows: [kv_heads, tiles, queries_per_kv * tile_tokens, head_dim] (``Tiles.pack``).
        k, v: [kv_heads, keys, head_dim] with contiguous head_dim, at least ``tiles.keys`` keys.
        tiles: sizes.
        scale: factor on the scores.
    """

    rows: Tensor
    k: Tensor
    v: Tensor
    tiles: Tiles
    scale: float

    def of_heads(self, index: Tensor) -> PackedTiles:
        """The same for the KV heads at ``index`` (copies)."""
        return PackedTiles(
            rows=self.rows[index],
            k=self.k[index],
            v=self.v[index],
            tiles=self.tiles,
            scale=self.scale,
        )


def local_attention(packed: PackedTiles, scratch: ScratchBuffers) -> Partial:
    """Causal attention of every tile over its local region.

    Returns:
        Partial of [kv_heads, tiles, queries_per_kv * tile_tokens, ...]; nobody reads the rows that
        hold no query.

    Raises:
        ValueError: a tile that is no whole number of blocks.
    """
    rows = packed.rows
    tiles = packed.tiles
    kv_heads, count, row_count, head_dim = rows.shape
    tile = tiles.tile_tokens
    block = tiles.block_tokens
    if tile % block:
        raise ValueError(f"a tile of {tile} tokens is no whole number of blocks of {block}")
    before = tiles.q_offset % block  # keys of the local region before the tile's first query
    length = before + tile
    first = tiles.q_offset - before
    # Keys after the last query do not exist yet; queries that do exist are masked from them.
    whole = tiles.queries // tile
    shape = (kv_heads * count, length, head_dim)
    windows = []
    for name, x in (("local keys", packed.k), ("local values", packed.v)):
        window = scratch.get(name, shape, x).view(kv_heads, count, length, head_dim)
        if whole:
            unfolded = x[:, first : first + before + whole * tile].unfold(1, length, tile)
            window[:, :whole] = unfolded.transpose(2, 3)  # unfold puts the window last
        if whole < count:
            rest = x[:, first + whole * tile : tiles.keys]
            window[:, whole, : rest.shape[1]] = rest
            window[:, whole, rest.shape[1] :] = 0
        windows.append(window.view(shape))
    hidden = torch.ones(tile, tile, dtype=torch.bool).triu(1).repeat(row_count // tile, 1)
    out, lse = attend_rows(rows.flatten(0, 1), windows[0], windows[1], packed.scale, hidden=hidden)
    return Partial(out.reshape(rows.shape), lse.reshape(rows.shape[:3]))


def kept_attention(packed: PackedTiles, csr: BlockCSR, scratch: ScratchBuffers) -> Partial:
    """Attention of every tile over its kept blocks, those of ``csr``.

    Returns:
        Partial of [kv_heads, tiles, queries_per_kv * tile_tokens, ...]; 0 and -inf for a tile that
        keeps nothing.
    """
    rows = packed.rows
    gathered = _Gathered.of(packed, csr, scratch)
    lse_dtype = accumulation_dtype(rows.dtype)
    out = torch.empty_like(rows).flatten(0, 1)
    lse = rows.new_full(out.shape[:2], -torch.inf, dtype=lse_dtype)

    def attend_batch(piece: tuple[int, list[int]], worker: int) -> None:
        kept, batch = piece
        index = slice(batch[0], batch[0] + 1) if len(batch) == 1 else batch  # a view, if it can be
        if kept:
            keys, values = gathered.gather(kept, batch, worker)
            out[index], lse[index] = attend_rows(gathered.rows[index], keys, values, packed.scale)
        else:
            out[index] = 0

    parallel_for(attend_batch, list(gathered.batches()))
    return Partial(out.view(rows.shape), lse.view(rows.shape[:3]))


def attend_listed(packed: PackedTiles, lists: Sequence[Tensor], scratch: ScratchBuffers) -> Partial:
    """Attention of tiles of one KV head, each over the blocks of a list of its own.

    Args:
        packed: with rows [1, tiles, queries_per_kv * tile_tokens, head_dim].
        lists: [tiles] int32 numbers of blocks.

    Returns:
        Partial of [tiles, queries_per_kv * tile_tokens, ...].
    """
    starts = [0, *accumulate(len(blocks) for blocks in lists)]
    csr = BlockCSR(torch.tensor(starts, dtype=torch.int32), torch.cat(list(lists)))
    part = kept_attention(packed, csr, scratch)
    return Partial(part.out[0], part.lse[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gathered:
    """Where the kept blocks of a tile are; row ``kv_head * tiles + tile`` of it.

    Attributes:
        rows: [kv_heads * tiles, queries_per_kv * tile_tokens, head_dim].
        k_blocks, v_blocks: per KV head [blocks, block_tokens, head_dim].
        starts: [kv_heads * tiles + 1] first place of each row in ``columns``.
        columns: numbers of the blocks, one row's after the other.
    """

    rows: Tensor
    k_blocks: list[Tensor]
    v_blocks: list[Tensor]
    starts: list[int]
    columns: Tensor
    tiles: Tiles
    scratch: ScratchBuffers

    @classmethod
    def of(cls, packed: PackedTiles, csr: BlockCSR, scratch: ScratchBuffers) -> _Gathered:
        block = packed.tiles.block_tokens
        whole = packed.k.shape[1] // block * block
        shape = (-1, block, packed.k.shape[-1])
        return cls(
            rows=packed.rows.flatten(0, 1),
            k_blocks=[head[:whole].view(shape) for head in packed.k],
            v_blocks=[head[:whole].view(shape) for head in packed.v],
            starts=csr.row_ptr.tolist(),
            columns=csr.col,
            tiles=packed.tiles,
            scratch=scratch,
        )

    def batches(self) -> Iterator[tuple[int, list[int]]]:
        """Kept blocks, and rows that keep so many; bounded memory."""
        by_length: dict[int, list[int]] = {}
        for row, (start, end) in enumerate(pairwise(self.starts)):
            by_length.setdefault(end - start, []).append(row)
        for kept, rows in by_length.items():
            floats = max(1, kept) * self.tiles.block_tokens * self.rows.shape[-1]
            size = max(1, _BATCH_FLOATS // floats)
            for i in range(0, len(rows), size):
                yield kept, rows[i : i + size]

    def gather(self, kept: int, batch: list[int], worker: int) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, kept * block_tokens, head_dim] of rows with ``kept`` blocks."""
        block = self.tiles.block_tokens
        head_dim = self.rows.shape[-1]
        shape = (len(batch), kept * block, head_dim)
        keys = self.scratch.get(f"kept keys {worker}", shape, self.k_blocks[0])
        values = self.scratch.get(f"kept values {worker}", shape, self.v_blocks[0])
        for i, row in enumerate(batch):
            head = row // self.tiles.count
            columns = self.columns[self.starts[row] : self.starts[row + 1]]
            into = (kept, block, head_dim)
            torch.index_select(self.k_blocks[head], 0, columns, out=keys[i].view(into))
            torch.index_select(self.v_blocks[head], 0, columns, out=values[i].view(into))
        return keys, values
