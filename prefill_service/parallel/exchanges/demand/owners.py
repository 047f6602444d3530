"""Which rank keeps the keys of which segment, when every key is kept once.

A segment is clustered as a whole, so all of its tokens go to one rank, its *home*: the rank that
computes the token in its middle. Shares of several segments move little of what they compute.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from prefill_service.parallel.token_layout import ChunkLayout


class OwnerMap:
    """Homes of a prompt's segments and blocks.

    Args:
        layout: of the prompt.
        ranks: of the group.
        block_tokens, segment_tokens: sizes; a segment is whole blocks.
    """

    def __init__(
        self, layout: ChunkLayout, ranks: int, block_tokens: int, segment_tokens: int
    ) -> None:
        self.block_tokens, self.segment_tokens = block_tokens, segment_tokens
        self.ranks = ranks
        ranges = [
            (start, end, rank)
            for chunk in layout.shares
            for rank, share in enumerate(chunk)
            for start, end in share.ranges
        ]
        tokens = max(end for _, end, _ in ranges)
        computes = np.empty(tokens, np.int32)
        for start, end, rank in ranges:
            computes[start:end] = rank
        starts = np.arange(0, tokens, segment_tokens)
        self.segment_home = computes[np.minimum(starts + segment_tokens // 2, tokens - 1)]
        self.blocks = -(-tokens // block_tokens)
        per_segment = segment_tokens // block_tokens
        self.block_home = np.repeat(self.segment_home, per_segment)[: self.blocks]
        # A home keeps its blocks in prompt order; its i-th is ids[i].
        self._slot = np.empty(self.blocks, np.int64)
        for rank in range(ranks):
            ids = np.flatnonzero(self.block_home == rank)
            self._slot[ids] = np.arange(len(ids))

    @cached_property
    def _ids(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.block_home == rank) for rank in range(self.ranks)]

    def ids(self, rank: int, before_token: int | None = None) -> np.ndarray:
        """Blocks at home on a rank, ascending; of those, the ones that begin before a token."""
        ids = self._ids[rank]
        if before_token is None:
            return ids
        return ids[: np.searchsorted(ids, -(-before_token // self.block_tokens))]

    def home_of(self, tokens: np.ndarray) -> np.ndarray:
        """Rank that keeps each token."""
        homes: np.ndarray = self.segment_home[tokens // self.segment_tokens]
        return homes

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Where each token lies in its home's buffer."""
        blocks, within = np.divmod(tokens, self.block_tokens)
        rows: np.ndarray = self._slot[blocks] * self.block_tokens + within
        return rows
