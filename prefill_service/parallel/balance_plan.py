"""Which rank computes which kept blocks, once it is known how many each has (db-SP, 2511.23113).

The paper assigns whole blocks of queries greedily, with a reward for those that stay. Here results
over disjoint keys are merged anyway, so what moves is a run of kept blocks of one query tile, of
whatever length evens out two ranks: few tiles move, and the largest ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_GOAL = 1.02
"""Busiest rank over the mean that is good enough."""

_PRICE = 2
"""A moved tile costs both ranks as much as so many blocks: its queries and results travel."""

_LEAST = 2 * _PRICE
"""Fewer blocks are not worth it."""


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank has to compute.

    Attributes:
        fixed: (query, key) pairs that it computes itself in any case.
        blocks: [kv_heads][tiles] kept blocks that others could attend to.
        pairs: [tiles] (query, key) pairs of one block.
    """

    fixed: int
    blocks: Sequence[Sequence[int]]
    pairs: Sequence[int]

    @property
    def total(self) -> int:
        """All pairs."""
        return self.fixed + sum(
            count * pairs
            for head in self.blocks
            for count, pairs in zip(head, self.pairs, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Move:
    """Kept blocks ``first`` to ``first + count`` of one tile are another rank's to attend to."""

    giver: int
    taker: int
    head: int
    tile: int
    first: int
    count: int


def imbalance(totals: Sequence[float]) -> float:
    """Busiest rank over the mean; 1 where there is nothing to do."""
    return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0


def plan_moves(loads: Sequence[Load], above: float) -> list[Move]:
    """Even out what ranks have to compute; every rank finds the same.

    Args:
        loads: of every rank.
        above: imbalance up to which nothing moves.

    Returns:
        At most one move for a tile and taker. No rank both gives and takes, and none becomes
        busier than the busiest was.
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
    moves: list[Move] = []
    while True:
        giver, taker = totals.index(max(totals)), totals.index(min(totals))
        if totals[giver] <= _GOAL * mean or not left[giver]:
            return moves
        (head, tile), there = max(left[giver].items(), key=lambda item: item[1])
        pairs = loads[giver].pairs[tile]
        room = int(min(totals[giver] - mean, mean - totals[taker] - _PRICE * pairs) // pairs)
        count = min(there, room)
        if count < _LEAST:
            return moves
        left[giver][head, tile] -= count
        if count == there:
            del left[giver][head, tile]
        moves.append(Move(giver, taker, head, tile, there - count, count))
        totals[giver] -= count * pairs
        totals[taker] += (count + _PRICE) * pairs
