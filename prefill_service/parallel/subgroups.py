"""Which ranks may compute a prefix together: intervals of neighbours, halved again and again.

Any two of these teams are disjoint or one contains the other, so whatever mix of them is at work,
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
        """Its ranks; a rank's place among them is its rank in the team's groups."""
        return range(self.first, self.first + self.size)

    def contains(self, other: Subgroup) -> bool:
        """Whether all of ``other``'s ranks are this team's."""
        return self.first <= other.first and other.members.stop <= self.members.stop

    def overlaps(self, other: Subgroup) -> bool:
        """Whether a rank is in both."""
        return self.first < other.members.stop and other.first < self.members.stop

    def __str__(self) -> str:
        """``rank 2`` or ``ranks 0-3``."""
        last = self.members.stop - 1
        return f"rank {last}" if self.size == 1 else f"ranks {self.first}-{last}"


def form_subgroups(ranks: int, elastic: bool = True) -> tuple[Subgroup, ...]:
    """All teams of so many ranks, larger ones first; only the team of all unless ``elastic``.

    A team of an odd number is cut into a larger first and a smaller second part.
    """
    found = [Subgroup(0, ranks)]
    if elastic:
        for team in found:  # which grows meanwhile
            if team.size > 1:
                half = -(-team.size // 2)
                found += [Subgroup(team.first, half), Subgroup(team.first + half, team.size - half)]
    return tuple(sorted(found, key=lambda team: (-team.size, team.first)))
