"""Which rank computes which tokens: temporal patches dealt to ranks, chunk by chunk.

The prompt is cut into chunks of whole temporal patches, and each chunk's patches are dealt to the
ranks. A rank then decodes, encodes and prefills *its own* frames, and has something to do from
the first chunk on.

* ``DEALT``: each rank one run of patches per chunk. Causal work is nearly even, because a chunk is
  short against what lies before it.
* ``ZIGZAG``: each chunk in 2P runs, of which rank r takes r and 2P-1-r, so that causal work is even
  even if the whole prompt is one chunk (USP, arXiv 2405.07719).
* One chunk of dealt patches is the contiguous layout.

Where attention is sparse, the last chunk's shares are whole units (``units``), as those of all
other chunks are anyway: less even, but then it does not matter which rank computes one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prefill_service.parallel.selection_units import SelectionUnits, patches_per_unit
from prefill_service.parallel.token_order import Order

Range = tuple[int, int]
"""First token, one past the last."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of temporal patches and of their tokens, the patches' text included; not empty."""

    first_patch: int
    end_patch: int
    start_token: int
    end_token: int

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return self.end_token - self.start_token


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of one chunk: pieces in ascending order, none if it has no part."""

    pieces: tuple[Piece, ...]

    @property
    def num_patches(self) -> int:
        """The number of temporal patches."""
        return sum(piece.end_patch - piece.first_patch for piece in self.pieces)

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def ranges(self) -> list[Range]:
        """Tokens of each piece."""
        return [(piece.start_token, piece.end_token) for piece in self.pieces]

    @property
    def contiguous(self) -> Range:
        """Tokens of a share of at most one piece; (0, 0) of none."""
        if len(self.pieces) > 1:
            raise ValueError(f"a share of {len(self.pieces)} pieces is not one range")
        return self.ranges[0] if self.pieces else (0, 0)

    def select_tokens(self, values: np.ndarray) -> np.ndarray:
        """This share's part of what every token has (ids, positions): [..., tokens] to the same."""
        parts = [values[..., start:end] for start, end in self.ranges]
        return np.concatenate(parts, -1) if parts else values[..., :0]

    def select_patches(self, values: np.ndarray, per_patch: int) -> np.ndarray:
        """This share's part of what every temporal patch has ``per_patch`` of (frames)."""
        parts = [values[p.first_patch * per_patch : p.end_patch * per_patch] for p in self.pieces]
        return np.concatenate(parts) if parts else values[:0]


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Shares of all chunks and ranks: ``shares[chunk][rank]``."""

    shares: tuple[tuple[Share, ...], ...]

    def of_rank(self, rank: int) -> Iterator[Share]:
        """The rank's share of every chunk, in order."""
        return (chunk[rank] for chunk in self.shares)


def deal_patches(
    patch_ends: Sequence[int] | np.ndarray,
    ranks: int,
    chunk_tokens: int,
    *,
    order: Order = Order.DEALT,
    whole_units: bool = False,
) -> ChunkLayout:
    """Deal temporal patches to ranks.

    Args:
        patch_ends: [patches] one past each patch's last token, ascending.
        ranks: ranks of the group.
        chunk_tokens: tokens per chunk and rank to aim at; at least one patch is taken.
        order: of the patches of a chunk.
        whole_units: of dealt patches, cut no unit.

    Raises:
        ValueError: no patches.
    """
    patches = len(patch_ends)
    if patches == 0:
        raise ValueError("a video has at least one temporal patch")
    per_rank = patches_per_unit(patch_ends, chunk_tokens)
    units = SelectionUnits.of(patch_ends, chunk_tokens)
    bounds = [0, *(int(end) for end in patch_ends)]
    parts = ranks if order is Order.DEALT else 2 * ranks
    chunks = []
    for first in range(0, patches, per_rank * ranks):
        end = min(first + per_rank * ranks, patches)
        count = end - first
        # The first `count % parts` parts take one patch more: they have the least to attend to.
        cuts = [first + p * (count // parts) + min(p, count % parts) for p in range(parts + 1)]
        # Of a full chunk that is one unit for each rank.
        if whole_units and order is Order.DEALT and count < per_rank * ranks:
            edges = units.between(first, end)
            cuts = [min(edges, key=lambda edge: (abs(edge - cut), -edge)) for cut in cuts]
        pieces = [Piece(a, b, bounds[a], bounds[b]) for a, b in pairwise(cuts)]
        chunks.append(tuple(_share(pieces, rank, order) for rank in range(ranks)))
    return ChunkLayout(tuple(chunks))


def deal_text(start: int, end: int, ranks: int, chunk_tokens: int) -> ChunkLayout:
    """Deal tokens [start, end), which belong to no patch, evenly to ranks, chunk by chunk."""
    chunks = []
    for first in range(start, end, chunk_tokens * ranks):
        count = min(chunk_tokens * ranks, end - first)
        cuts = [first + count * rank // ranks for rank in range(ranks + 1)]
        chunks.append(tuple(share_of([(a, b)]) for a, b in pairwise(cuts)))
    return ChunkLayout(tuple(chunks))


def share_of(ranges: Iterable[Range]) -> Share:
    """A share of ascending ranges of tokens, whose patches are of no concern; empty ones go."""
    return Share(tuple(Piece(0, 0, start, end) for start, end in ranges if end > start))


def _share(pieces: list[Piece], rank: int, order: Order) -> Share:
    mine = [pieces[rank]] if order is Order.DEALT else [pieces[rank], pieces[-1 - rank]]
    return Share(tuple(piece for piece in mine if piece.num_tokens))


def chunk_range(chunk: Iterable[Share]) -> Range:
    """First token of a chunk and one past its last, over the ranks that have a share of it."""
    ranges = [piece for share in chunk for piece in share.ranges]
    return min(start for start, _ in ranges), max(end for _, end in ranges)


def join(ranges: Iterable[Range]) -> list[Range]:
    """Disjoint ranges in ascending order, neighbours made one, empty ones left out."""
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        elif end > start:
            joined.append((start, end))
    return joined


class HeldTokens:
    """Which tokens each member of a group holds, in rows of ascending position.

    Tokens arrive chunk by chunk, and no chunk has a token before one of an earlier chunk, so a
    member's rows stay in token order by appending, and what a query may see of them is a prefix.
    """

    def __init__(self, members: int) -> None:
        self._starts: list[list[int]] = [[] for _ in range(members)]
        self._ends: list[list[int]] = [[] for _ in range(members)]
        self._rows: list[list[int]] = [[] for _ in range(members)]  # before each range

    def extend(self, member: int, ranges: Iterable[Range]) -> None:
        """Append ascending ranges that lie after all that the member holds."""
        starts = self._starts[member]
        ends = self._ends[member]
        rows = self._rows[member]
        for start, end in ranges:
            if ends and ends[-1] == start:
                ends[-1] = end
                continue
            rows.append(self.count(member))
            starts.append(start)
            ends.append(end)

    def count(self, member: int) -> int:
        """Tokens that the member holds."""
        starts = self._starts[member]
        ends = self._ends[member]
        rows = self._rows[member]
        return rows[-1] + ends[-1] - starts[-1] if rows else 0

    def count_before(self, member: int, token: int) -> int:
        """Tokens that the member holds before ``token``."""
        index = bisect_right(self._starts[member], token) - 1
        if index < 0:
            return 0
        start = self._starts[member][index]
        end = self._ends[member][index]
        return self._rows[member][index] + min(token, end) - start
