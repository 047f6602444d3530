"""Which rank keeps the keys of which segment, when every key is kept once.

A segment is clustered as a whole, so all of its tokens go to one rank, its *owner*: the rank that
computes the token in its middle. Shares of several segments move little of what they compute.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from prefill_service.attention.settings import Segments
from prefill_service.parallel.token_layout import ChunkLayout


class OwnerMap:
    """Owners of a prompt's segments and blocks.

    Args:
        layout: of the prompt.
        ranks: of the group.
        segments: sizes of blocks and segments; a segment is whole blocks.

    Attributes:
        num_blocks: of the prompt, the last one perhaps not full.
        segment_owner: [segments] rank.
        block_owner: [blocks] rank.
    """

    def __init__(self, layout: ChunkLayout, ranks: int, segments: Segments) -> None:
        self._ranks = ranks
        self._block_tokens = segments.block_tokens
        self._segment_tokens = segments.segment_tokens
        ranges = [
            (start, end, rank)
            for chunk in layout.shares
            for rank, share in enumerate(chunk)
            for start, end in share.ranges
        ]
        tokens = max(end for _, end, _ in ranges)
        computed_by = np.empty(tokens, np.int32)
        for start, end, rank in ranges:
            computed_by[start:end] = rank
        starts = np.arange(0, tokens, self._segment_tokens)
        middles = np.minimum(starts + self._segment_tokens // 2, tokens - 1)
        self.segment_owner: np.ndarray = computed_by[middles]
        self.num_blocks = -(-tokens // self._block_tokens)
        per_segment = self._segment_tokens // self._block_tokens
        self.block_owner = np.repeat(self.segment_owner, per_segment)[: self.num_blocks]

    @cached_property
    def _ids(self) -> list[np.ndarray]:
        """The blocks of each rank, ascending: the order in which it keeps them."""
        return [np.flatnonzero(self.block_owner == rank) for rank in range(self._ranks)]

    @cached_property
    def _slot(self) -> np.ndarray:
        """[blocks] the place of each block among its owner's."""
        slots = np.empty(self.num_blocks, np.int64)
        for ids in self._ids:
            slots[ids] = np.arange(len(ids))
        return slots

    def block_ids(self, rank: int, before_token: int | None = None) -> np.ndarray:
        """Blocks that a rank owns, ascending; of those, the ones that begin before a token."""
        ids = self._ids[rank]
        if before_token is None:
            return ids
        return ids[: np.searchsorted(ids, -(-before_token // self._block_tokens))]

    def owners_of(self, tokens: np.ndarray) -> np.ndarray:
        """Rank that keeps each token."""
        owners: np.ndarray = self.segment_owner[tokens // self._segment_tokens]
        return owners

    def owner_rows(self, tokens: np.ndarray) -> np.ndarray:
        """Where each token lies in its owner's buffer."""
        blocks, within = np.divmod(tokens, self._block_tokens)
        rows: np.ndarray = self._slot[blocks] * self._block_tokens + within
        return rows
