"""Query tiles and the keys that each of them may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries cut into tiles of ``tile_tokens``; the last one may be shorter.

    A tile attends exactly, under the causal mask, to its *local region*: from the start of the
    block that its first query lies in up to each query's own position. Every block before that is
    complete and visible to all of the tile's queries: a *candidate*, which needs no mask.

    Attributes:
        queries: how many.
        q_offset: position of the first query among the keys.
        tile_tokens, block_tokens: sizes.
    """

    queries: int
    q_offset: int
    tile_tokens: int
    block_tokens: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return -(-self.queries // self.tile_tokens)

    @property
    def keys(self) -> int:
        """Keys that the last query sees, itself included."""
        return self.q_offset + self.queries

    def candidates(self, tile: int) -> int:
        """Blocks before the tile's local region."""
        return (self.q_offset + tile * self.tile_tokens) // self.block_tokens

    @property
    def blocks(self) -> int:
        """Candidates of the last tile; no tile has more."""
        return self.candidates(self.count - 1)

    def hidden(self, device: torch.device) -> Tensor:
        """[tiles, blocks] bool, blocks that are no candidates of a tile."""
        limit = torch.tensor([self.candidates(tile) for tile in range(self.count)], device=device)
        return torch.arange(self.blocks, device=device) >= limit[:, None]

    def local_start(self, tile: int) -> int:
        """First key of the tile's local region."""
        return self.candidates(tile) * self.block_tokens

    @property
    def causal_keys(self) -> int:
        """Keys that dense causal attention visits, summed over the queries."""
        return self.queries * self.q_offset + self.queries * (self.queries + 1) // 2

    @property
    def local_keys(self) -> int:
        """The part of ``causal_keys`` that lies in the local regions."""
        before = sum(self.local_start(tile) * self.tokens(tile) for tile in range(self.count))
        return self.causal_keys - before

    def tokens(self, tile: int) -> int:
        """Queries of a tile."""
        return min(self.tile_tokens, self.queries - tile * self.tile_tokens)

    def pack(self, q: Tensor, kv_heads: int) -> Tensor:
        """The queries of all query heads of a KV head as the rows of its tiles; missing ones are 0.

        Args:
            q: [q_heads, queries, head_dim].

        Returns:
            [kv_heads, tiles, queries_per_kv * tile_tokens, head_dim].
        """
        q_heads, queries, head_dim = q.shape
        missing = self.count * self.tile_tokens - queries
        if missing:
            q = torch.nn.functional.pad(q, (0, 0, 0, missing))
        packed = q.reshape(kv_heads, q_heads // kv_heads, self.count, self.tile_tokens, head_dim)
        return packed.transpose(1, 2).reshape(kv_heads, self.count, -1, head_dim)

    def unpack(self, rows: Tensor, q_heads: int) -> Tensor:
        """The reverse of ``pack``: [kv_heads, tiles, rows, ...] to [q_heads, queries, ...]."""
        kv_heads = rows.shape[0]
        split = (kv_heads, self.count, q_heads // kv_heads, self.tile_tokens, *rows.shape[3:])
        joined = rows.reshape(split).transpose(1, 2)
        return joined.reshape(q_heads, -1, *rows.shape[3:])[:, : self.queries]

    def row_weights(self, queries_per_kv: int, like: Tensor) -> Tensor:
        """[tiles, rows] weights of packed rows: 1 / rows that hold a query, 0 for the others."""
        position = torch.arange(self.count * self.tile_tokens, device=like.device)
        present = (position < self.queries).reshape(self.count, 1, self.tile_tokens)
        present = present.expand(-1, queries_per_kv, -1).reshape(self.count, -1).to(like.dtype)
        return present / present.sum(1, keepdim=True)
