"""Which rank computes which tokens: temporal patches dealt to ranks, chunk by chunk.

The prompt is cut into chunks of whole temporal patches and each chunk's patches are dealt to the
ranks in contiguous runs. A rank then decodes, encodes and prefills *its own* frames, causal work
is nearly even (a chunk is short against what lies before it), and every rank has something to
do from the first chunk on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of one chunk. Both ranges may be empty.

    Attributes:
        first_patch, end_patch: temporal patches.
        start_token, end_token: tokens of the prompt, the patches' text included.
    """

    first_patch: int
    end_patch: int
    start_token: int
    end_token: int

    @property
    def num_patches(self) -> int:
        """Temporal patches of this share."""
        return self.end_patch - self.first_patch

    @property
    def num_tokens(self) -> int:
        """Tokens of this share."""
        return self.end_token - self.start_token


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """Shares of all chunks and ranks; ``shares[chunk][rank]``, contiguous in token order."""

    shares: tuple[tuple[Share, ...], ...]

    def of_rank(self, rank: int) -> Iterator[Share]:
        """The rank's share of every chunk, in order."""
        return (chunk[rank] for chunk in self.shares)


def deal_patches(
    patch_ends: Sequence[int] | np.ndarray, ranks: int, chunk_tokens: int
) -> ChunkLayout:
    """Deal temporal patches to ranks.

    Args:
        patch_ends: [patches] one past each patch's last token, ascending.
        ranks: ranks of the group.
        chunk_tokens: tokens per chunk and rank to aim at; at least one patch is taken.

    Raises:
        ValueError: no patches.
    """
    patches = len(patch_ends)
    if patches == 0:
        raise ValueError("a video has at least one temporal patch")
    tokens_per_patch = -(-int(patch_ends[-1]) // patches)
    per_rank = max(1, chunk_tokens // tokens_per_patch)
    bounds = [0, *(int(end) for end in patch_ends)]
    chunks = []
    for first in range(0, patches, per_rank * ranks):
        count = min(per_rank * ranks, patches - first)
        # The first `count % ranks` ranks take one patch more: they have the least to attend to.
        cuts = [first + r * (count // ranks) + min(r, count % ranks) for r in range(ranks + 1)]
        chunks.append(tuple(Share(a, b, bounds[a], bounds[b]) for a, b in pairwise(cuts)))
    return ChunkLayout(tuple(chunks))
