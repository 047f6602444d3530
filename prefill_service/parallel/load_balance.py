"""Which rank attends to which selected blocks: ranks with much to do delegate some of them.

After selection every rank knows how much all have to attend to, and all decide alike which rank
attends to which kept blocks (db-SP, arXiv 2511.23113). The paper assigns whole blocks of queries
greedily, with a reward for those that stay. Here results over disjoint keys are merged anyway
(``exchanges/delegation.py``), so a delegation is a run of kept blocks of one query tile, of
whatever length evens out two ranks: few tiles are delegated, and the largest ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_EVEN_ENOUGH = 1.02
"""Busiest rank over the mean that is good enough."""

_PRICE_BLOCKS = 2
"""A delegated tile costs both ranks as much as so many blocks: queries and results travel."""

_FEWEST_BLOCKS = 2 * _PRICE_BLOCKS
"""Fewer blocks are not worth delegating."""


@dataclass(frozen=True, slots=True)
class BalanceLimits:
    """When ranks even out what they attend to.

    Attributes:
        above: imbalance up to which nothing is delegated; 0: nothing ever is.
        least_gain: floating-point operations that the busiest rank of a layer has to be spared.
    """

    above: float
    least_gain: float = 0.0


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank's queries have to attend to.

    Attributes:
        fixed: (query, key) pairs that cannot be delegated.
        blocks: [kv_heads][tiles] kept blocks that can be.
        pairs: [tiles] (query, key) pairs of one block.
    """

    fixed: int
    blocks: Sequence[Sequence[int]]
    pairs: Sequence[int]

    @property
    def total(self) -> int:
        """The number of (query, key) pairs."""
        return self.fixed + sum(
            count * pairs
            for head in self.blocks
            for count, pairs in zip(head, self.pairs, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """Blocks ``first`` to ``first + count`` of those that a tile keeps, for another rank.

    Attributes:
        from_rank: has the tile's queries.
        to_rank: attends to the blocks.
        head: the KV head.
        tile: of the queries of ``from_rank``.
        first, count: among the tile's kept blocks, in ascending order.
    """

    from_rank: int
    to_rank: int
    head: int
    tile: int
    first: int
    count: int


def imbalance(totals: Sequence[float]) -> float:
    """Busiest rank over the mean; 1 where there is nothing to do."""
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0


def choose_delegations(loads: Sequence[Load], above: float) -> list[Delegation]:
    """Even out what ranks attend to; every rank finds the same.

    Args:
        loads: of every rank.
        above: imbalance up to which nothing is delegated.

    Returns:
        At most one delegation for a tile and ``to_rank``. No rank both delegates and is delegated
        to, and none becomes busier than the busiest was.
    """
    totals = [load.total for load in loads]
    if imbalance(totals) <= above:
        return []
    mean = sum(totals) / len(totals)
    left = [
        {
            (h, t): count
            for h, head in enumerate(load.blocks)
            for t, count in enumerate(head)
            if count
        }
        for load in loads
    ]
    found: list[Delegation] = []
    while True:
        busiest = totals.index(max(totals))
        idlest = totals.index(min(totals))
        if totals[busiest] <= _EVEN_ENOUGH * mean or not left[busiest]:
            return found
        (head, tile), kept = max(left[busiest].items(), key=lambda item: item[1])
        pairs = loads[busiest].pairs[tile]
        surplus = totals[busiest] - mean
        room = mean - totals[idlest] - _PRICE_BLOCKS * pairs
        count = min(kept, int(min(surplus, room) // pairs))
        if count < _FEWEST_BLOCKS:
            return found
        left[busiest][head, tile] -= count
        if count == kept:
            del left[busiest][head, tile]
        found.append(
            Delegation(
                from_rank=busiest,
                to_rank=idlest,
                head=head,
                tile=tile,
                first=kept - count,
                count=count,
            )
        )
        totals[busiest] -= count * pairs
        totals[idlest] += (count + _PRICE_BLOCKS) * pairs
