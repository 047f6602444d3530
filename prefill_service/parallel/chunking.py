"""Tokens of each chunk and rank, and the (query, key) pairs that they attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefill_service.parallel.token_order import Order

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chunking:
    """A prompt cut into chunks, each shared among ranks.

    Attributes:
        tokens: [chunks, ranks] of each share.
        pairs: [chunks, ranks] causal (query, key) pairs of each share's queries with all keys.
    """

    tokens: Ints
    pairs: Floats

    @property
    def ranks(self) -> int:
        """Ranks that share each chunk."""
        return int(self.tokens.shape[1])

    @property
    def held(self) -> Ints:
        """[chunks, ranks] tokens that each rank computed up to and with each chunk."""
        return self.tokens.cumsum(0)

    def by_rows(self, size: int) -> Chunking:
        """The chunking with each run of ``size`` ranks, a row of the mesh, taken as one rank."""
        chunks = self.tokens.shape[0]
        return Chunking(
            self.tokens.reshape(chunks, -1, size).sum(2),
            self.pairs.reshape(chunks, -1, size).sum(2),
        )


def deal_tokens(tokens: int, ranks: int, chunk_tokens: int, order: Order = Order.DEALT) -> Chunking:
    """Cut a prompt into even shares; patches' borders, which move them a little, are left out.

    Args:
        tokens: of the prompt.
        ranks: that share each chunk.
        chunk_tokens: per rank; the last chunk may be shorter.

    Raises:
        ValueError: one of them is below 1.
    """
    for name, value in (("tokens", tokens), ("ranks", ranks), ("chunk_tokens", chunk_tokens)):
        if value < 1:
            raise ValueError(f"{name} = {value} is not accepted; expected 1 or more")
    starts = np.arange(0, tokens, chunk_tokens * ranks)
    counts = np.minimum(chunk_tokens * ranks, tokens - starts)
    parts = ranks if order is Order.DEALT else 2 * ranks
    index = np.arange(parts + 1)
    each, rest = np.divmod(counts, parts)
    cuts = starts[:, None] + each[:, None] * index + np.minimum(index, rest[:, None])
    return _from_pieces(cuts, order)


def chunking_of(ranges: Sequence[Sequence[Sequence[tuple[int, int]]]]) -> Chunking:
    """From a real layout: per chunk and rank its token ranges [start, end)."""
    tokens = [[sum(b - a for a, b in share) for share in chunk] for chunk in ranges]
    pairs = [
        [sum((b - a) * (a + b + 1) / 2 for a, b in share) for share in chunk] for chunk in ranges
    ]
    return Chunking(np.array(tokens, np.int64), np.array(pairs, np.float64))


def _from_pieces(cuts: Ints, order: Order) -> Chunking:
    start = cuts[:, :-1]
    end = cuts[:, 1:]
    tokens = end - start
    # The query at position t sees t + 1 keys.
    pairs = tokens * (start + end + 1.0) / 2
    if order is Order.ZIGZAG:  # rank r has pieces r and 2P-1-r
        half = tokens.shape[1] // 2
        tokens = tokens[:, :half] + tokens[:, : half - 1 : -1]
        pairs = pairs[:, :half] + pairs[:, : half - 1 : -1]
    return Chunking(tokens, pairs)
