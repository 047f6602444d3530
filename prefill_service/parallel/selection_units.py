"""Units: runs of temporal patches that sparse attention takes as one, wherever they are computed.

What a query selects depends on which queries share its tile, and on how far the keys before it are
clustered. Both are properties of a unit. Units are cut from the prompt and the chunk size alone,
so a prefix selects the same blocks on any number of ranks.

A unit is what one rank gets of a whole chunk. Towards the prompt's end, where the last chunk may
have too few of them for all ranks, units are cut in parts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_TAIL_UNITS = 4
"""So many units before the prompt's end are cut in parts."""

_PARTS = 4
_PART_TOKENS = 200
"""At most so many, of at least so many tokens: the floor needs rows to judge by, tiles queries."""


def patches_per_unit(patch_ends: Sequence[int] | np.ndarray, chunk_tokens: int) -> int:
    """Temporal patches of a unit: about ``chunk_tokens`` tokens, one patch at least."""
    tokens_per_patch = -(-int(patch_ends[-1]) // len(patch_ends))
    return max(1, chunk_tokens // tokens_per_patch)


@dataclass(frozen=True, slots=True)
class SelectionUnits:
    """Where the units of a prompt begin.

    Attributes:
        patches: first patch of each unit, then how many patches there are.
        tokens: first token of each unit, then how many tokens there are.
    """

    patches: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, patch_ends: Sequence[int] | np.ndarray, chunk_tokens: int) -> SelectionUnits:
        """Cut a prompt.

        Args:
            patch_ends: [patches] one past each patch's last token, ascending.
            chunk_tokens: tokens per chunk and rank (``deal_patches``).
        """
        count = len(patch_ends)
        whole = patches_per_unit(patch_ends, chunk_tokens)
        unit_tokens = whole * int(patch_ends[-1]) // count
        part = -(-whole // max(1, min(_PARTS, unit_tokens // _PART_TOKENS)))
        tail = (-(-count // whole) - _TAIL_UNITS) * whole
        edges: list[int] = []
        for first in range(0, count, whole):
            step = part if first >= tail else whole
            edges += range(first, min(first + whole, count), step)
        bounds = [0, *(int(end) for end in patch_ends)]
        edges.append(count)
        return cls(tuple(edges), tuple(bounds[edge] for edge in edges))

    def between(self, first_patch: int, end_patch: int) -> tuple[int, ...]:
        """First patches of the units of a run of whole units, then ``end_patch``."""
        first, last = (bisect_left(self.patches, patch) for patch in (first_patch, end_patch))
        return self.patches[first : last + 1]

    def cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Tokens [start, end) cut where units begin."""
        if start >= end:
            return []
        inner = self.tokens[bisect_right(self.tokens, start) : bisect_left(self.tokens, end)]
        edges = [start, *inner, end]
        return list(pairwise(edges))

    def split(
        self, start: int, end: int, is_sparse: Callable[[int, int], bool]
    ) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Cut tokens [start, end) into those attended to exactly and the sparse units after them.

        Args:
            is_sparse: whether a unit of some first token and number of tokens is; all after the
                first such unit are.
        """
        units = [
            (first, last) for first, last in self.cut(start, end) if is_sparse(first, last - first)
        ]
        return (start, units[0][0] if units else end), units
