"""Sizes of sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention_shape import BLOCK_TOKENS, TILE_TOKENS


@dataclass(frozen=True, slots=True)
class Segments:
    """How past keys are cut: segments are clustered, blocks are kept or dropped.

    Attributes:
        block_tokens: tokens per block.
        segment_tokens: tokens per segment, a power-of-two multiple of the block.
        fixed_tokens: first tokens of the prompt, whose blocks keep their place.
    """

    block_tokens: int
    segment_tokens: int
    fixed_tokens: int


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """Sizes of sparse attention.

    Attributes:
        from_tokens: queries that see fewer keys are computed exactly.
        block_tokens: tokens per key block.
        tile_tokens: tokens per query tile, a multiple of the block.
        segment_blocks: blocks per clustered segment, a power of two.
        sink_blocks: first blocks of the prompt that every tile keeps; at most a segment.
        verify_every_row: instead of some of each tile; to measure what sampling misses.
        verified_rows: of each chunk, if it has so many; 0: a 64th of them, 8 at most.
    """

    from_tokens: int
    block_tokens: int = BLOCK_TOKENS
    tile_tokens: int = TILE_TOKENS
    segment_blocks: int = 16
    sink_blocks: int = 1
    verify_every_row: bool = False
    verified_rows: int = 0

    @property
    def segment_tokens(self) -> int:
        """Tokens per clustered segment."""
        return self.block_tokens * self.segment_blocks

    def tiles(self, start: int, queries: int) -> Tiles:
        """Tiles of queries [start, start + queries)."""
        return Tiles(queries, start, self.tile_tokens, self.block_tokens)

    @property
    def segments(self) -> Segments:
        """How past keys are cut."""
        block = self.block_tokens
        return Segments(block, self.segment_tokens, self.sink_blocks * block)
