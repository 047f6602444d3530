"""Block-sparse attention on CPU: gather a tile's kept blocks, one SDPA call over them.

The rows of one (KV head, tile) are its group's heads times its tokens, and they share one list of
keys: kept blocks' tokens first, then the summaries of all candidates, where a bias of -inf leaves
out those that were kept. Rows with equally many kept blocks go through one batched call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefill_service.attention.dense import Partial
from prefill_service.attention.summaries import BlockSummaries
from prefill_service.attention.tiles import Tiles
from prefill_service.kernels.csr import BlockCSR

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
            held = self._held[name] = torch.empty(numel, dtype=like.dtype)
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
    shape = (kv_heads * count, 1, length, head_dim)
    parts = []
    for name, x in (("k", k), ("v", v)):
        part = buffers.get(name, shape, x).view(kv_heads, count, length, head_dim)
        if whole:
            windows = x[:, first : first + before + whole * tile].unfold(1, length, tile)
            part[:, :whole] = windows.transpose(2, 3)  # unfold puts the window last
        if whole < count:
            rest = x[:, first + whole * tile : tiles.keys]
            part[:, whole, : rest.shape[1]] = rest
            part[:, whole, rest.shape[1] :] = 0
        parts.append(part.view(shape))
    hidden = torch.ones(tile, length, dtype=torch.bool).triu(before + 1)
    mask = torch.zeros(packed // tile, tile, length, dtype=rows.dtype)
    mask = mask.masked_fill_(hidden, -torch.inf).view(1, 1, packed, length)
    q = rows.flatten(0, 1)[:, None]
    out, lse = _sdpa(q, parts[0], parts[1], mask.expand(len(q), -1, -1, -1), scale)
    return Partial(out.reshape(rows.shape), lse.reshape(rows.shape[:3]))


def far_attention(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    csr: BlockCSR,
    tiles: Tiles,
    scale: float,
    buffers: GatherBuffers,
    summaries: BlockSummaries | None = None,
    bias: Tensor | None = None,
) -> Partial:
    """Attention of every tile over its kept blocks and, given their bias, block summaries.

    Args:
        rows: [kv_heads, tiles, group * tile_tokens, head_dim] packed queries.
        k, v: [kv_heads, keys, head_dim] with contiguous head_dim.
        csr: kept blocks.
        summaries: of at least ``bias.shape[-1]`` blocks.
        bias: [kv_heads, tiles, blocks] logits of the summaries, -inf to leave one out.

    Returns:
        Partial of [kv_heads, tiles, group * tile_tokens, ...]; 0 and -inf for a tile that
        attends to nothing here.
    """
    kv_heads, count, packed, head_dim = rows.shape
    work = _Work(rows, k, v, csr, tiles, scale, buffers)
    if bias is not None and summaries is not None:
        work.bias = bias.to(rows.dtype).flatten(0, 1)
        work.k_mean, work.v_mean = (x.to(rows.dtype) for x in (summaries.k_mean, summaries.v_mean))
    lse_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.empty_like(rows).view(kv_heads * count, packed, head_dim)
    lse = rows.new_full((kv_heads * count, packed), -torch.inf, dtype=lse_dtype)
    for batch in work.batches():
        if len(batch) == 1:
            part = slice(batch[0], batch[0] + 1)  # a view, not an index
            out[part], lse[part] = work.attend(batch, part)
        else:
            out[batch], lse[batch] = work.attend(batch, batch)
    for row in work.empty_rows():
        out[row] = 0
    return Partial(out.view(rows.shape), lse.view(rows.shape[:3]))


@dataclass(slots=True)
class _Work:
    """The inputs of one ``far_attention``; ``row`` is ``kv_head * tiles + tile``."""

    rows: Tensor
    k: Tensor
    v: Tensor
    csr: BlockCSR
    tiles: Tiles
    scale: float
    buffers: GatherBuffers
    bias: Tensor | None = None  # [kv_heads * tiles, blocks]
    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    starts: list[int] = field(init=False)
    k_blocks: list[Tensor] = field(init=False)  # per KV head [blocks, block_tokens, head_dim]
    v_blocks: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.starts = self.csr.row_ptr.tolist()
        whole = self.k.shape[1] // self.tiles.block_tokens * self.tiles.block_tokens
        shape = (-1, self.tiles.block_tokens, self.k.shape[-1])
        self.k_blocks = [head[:whole].view(shape) for head in self.k]
        self.v_blocks = [head[:whole].view(shape) for head in self.v]

    def batches(self) -> list[list[int]]:
        """Rows to compute together: equally many kept blocks, bounded memory."""
        by_length: dict[tuple[int, int], list[int]] = {}
        for row in range(len(self.starts) - 1):
            if any(lengths := self._lengths(row)):
                by_length.setdefault(lengths, []).append(row)
        batches = []
        for (kept, seen), rows in by_length.items():
            floats = (kept * self.tiles.block_tokens + seen) * self.k.shape[-1]
            size = max(1, _BATCH_FLOATS // floats)
            batches += [rows[i : i + size] for i in range(0, len(rows), size)]
        return batches

    def empty_rows(self) -> list[int]:
        """Rows that attend to nothing."""
        return [row for row in range(len(self.starts) - 1) if not any(self._lengths(row))]

    def attend(self, batch: list[int], index: list[int] | slice) -> tuple[Tensor, Tensor]:
        """Output [batch, rows, head_dim] and LSE [batch, rows]; ``index`` is ``batch``."""
        size, head_dim = len(batch), self.k.shape[-1]
        kept, seen = self._lengths(batch[0])
        tokens = kept * self.tiles.block_tokens
        keys = self.buffers.get("k", (size, tokens + seen, head_dim), self.k)
        values = self.buffers.get("v", (size, tokens + seen, head_dim), self.v)
        for i, row in enumerate(batch):
            head = row // self.tiles.count
            if kept:
                col = self.csr.col[self.starts[row] : self.starts[row + 1]]
                blocks = (kept, self.tiles.block_tokens, head_dim)
                torch.index_select(self.k_blocks[head], 0, col, out=keys[i, :tokens].view(blocks))
                torch.index_select(self.v_blocks[head], 0, col, out=values[i, :tokens].view(blocks))
            if self.k_mean is not None and self.v_mean is not None and seen:
                keys[i, tokens:] = self.k_mean[head, :seen]
                values[i, tokens:] = self.v_mean[head, :seen]
        mask = None
        if self.bias is not None and seen:
            mask = self.buffers.get("mask", (size, 1, 1, tokens + seen), self.rows)
            mask[..., :tokens] = 0
            mask[:, 0, 0, tokens:] = self.bias[index, :seen]
            mask = mask.expand(-1, -1, self.rows.shape[2], -1)
        rows = self.rows.flatten(0, 1)[index][:, None]
        out, lse = _sdpa(rows, keys[:, None], values[:, None], mask, self.scale)
        return out[:, 0], lse[:, 0]

    def _lengths(self, row: int) -> tuple[int, int]:
        """Kept blocks and summaries among the row's keys."""
        return self.starts[row + 1] - self.starts[row], self._seen(row)

    def _seen(self, row: int) -> int:
        """Summaries among the row's keys."""
        return 0 if self.bias is None else self.tiles.candidates(row % self.tiles.count)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's CPU flash kernel, all [batch, 1, length, head_dim]; the LSE is natural."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse.to(torch.float64) if q.dtype == torch.float64 else lse
