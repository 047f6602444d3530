"""Which ranks may compute a prefix together: intervals of neighbours, halved again and again.

Any two of these subgroups are disjoint or one contains the other, so whichever of them compute,
a rank that waits in a collective waits for ranks that do the same task. All of them, and with them
their process groups, are known at start (FlexSP, arXiv 2412.01523, keeps its groups likewise).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Subgroup:
    """``size`` neighbouring ranks from ``first`` on."""

    first: int
    size: int

    @property
    def members(self) -> range:
        """The member ranks. A member's index is its rank in the subgroup's process groups."""
        return range(self.first, self.first + self.size)

    def contains(self, other: Subgroup) -> bool:
        """Whether all of ``other``'s ranks are this subgroup's."""
        return self.first <= other.first and other.members.stop <= self.members.stop

    def overlaps(self, other: Subgroup) -> bool:
        """Whether a rank is in both."""
        return self.first < other.members.stop and other.first < self.members.stop

    def __str__(self) -> str:
        """The subgroup in messages, such as ``rank 2`` or ``ranks 0-3``."""
        last = self.members.stop - 1
        return f"rank {last}" if self.size == 1 else f"ranks {self.first}-{last}"


def form_subgroups(ranks: int, elastic: bool = True) -> tuple[Subgroup, ...]:
    """All subgroups of ``ranks`` ranks, larger ones first; without ``elastic`` only all ranks.

    An odd number of ranks is cut into a larger first and a smaller second part.
    """
    found = [Subgroup(0, ranks)]
    if elastic:
        for subgroup in found:  # which grows meanwhile
            if subgroup.size > 1:
                half = -(-subgroup.size // 2)
                found += [
                    Subgroup(subgroup.first, half),
                    Subgroup(subgroup.first + half, subgroup.size - half),
                ]
    return tuple(sorted(found, key=lambda subgroup: (-subgroup.size, subgroup.first)))
