"""How K and V circulate in a group of ranks: round one ring, or round edge-disjoint rings at once.

Ring attention with K and V moving (Ring Self-Attention, arXiv 2105.13120, with the online softmax
of arXiv 2310.01889), and TASP's several rings (arXiv 2509.26541). Both move every rank's rows to
every other rank once, ``2 * kv_heads * head_dim * bytes * tokens * (P-1)/P`` per rank and layer;
the rings differ in how many links are busy at a time. The next rows travel while the ones at hand
are attended to.

This module imports no torch: the catalogue asks it on how many ranks there are disjoint rings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from prefill_service.parallel.process_group import SPGroup, Transfer

Cycle = list[int]
"""Ranks in the order in which data visits them."""

_CYCLES_OF_EIGHT = (
    (0, 5, 6, 3, 7, 2, 1, 4),
    (0, 4, 2, 3, 5, 7, 1, 6),
    (0, 3, 2, 7, 5, 4, 6, 1),
    (0, 7, 6, 2, 4, 1, 5, 3),
    (0, 6, 7, 4, 3, 1, 2, 5),
    (0, 2, 6, 5, 1, 3, 4, 7),
    (0, 1, 7, 3, 6, 4, 5, 2),
)


def hamiltonian_cycles(ranks: int) -> list[Cycle]:
    """Edge-disjoint cycles: rings that together use every directed link at most once.

    A single ring uses n of the n (n - 1) directed links between n ranks. Where the complete
    directed graph falls apart into n - 1 Hamiltonian cycles, n - 1 rings at once use all of them in
    every step. It does for every n but 4 and 6 (Tillson, 1980). Odd n by Walecki's construction,
    each undirected cycle in both directions; n = 8 from a table that a search found; larger even n,
    which no full mesh of links connects today, are left out.

    Returns:
        ``ranks - 1`` edge-disjoint cycles where they are known, otherwise one ring.

    Raises:
        ValueError: fewer than two ranks.
    """
    if ranks < 2:
        raise ValueError(f"a cycle needs at least 2 ranks, got {ranks}")
    if ranks == 8:
        return [list(cycle) for cycle in _CYCLES_OF_EIGHT]
    if ranks % 2 == 0:
        return [list(range(ranks))]
    around = ranks - 1  # the ranks on Walecki's circle; the last one is its hub
    zigzag = [(step + 1) // 2 * (1 if step % 2 else -1) for step in range(around)]
    cycles = []
    for turn in range(around // 2):
        cycle = [around, *((turn + step) % around for step in zigzag)]
        cycles += [cycle, cycle[::-1]]
    return cycles


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one member of the ring.

    Attributes:
        member: whose.
        first: index of the first among what the member holds.
        kv: [rows, 2, kv_heads, head_dim].
    """

    member: int
    first: int
    kv: Tensor


def circulate(group: SPGroup, own: Tensor, rows: list[int], cycles: list[Cycle]) -> Iterator[Rows]:
    """All rows of all members, this rank's own first; every member iterates to the end.

    Each rank's rows are cut in as many parts as there are cycles, and each part goes round its own.

    Args:
        own: [rows, 2, kv_heads, head_dim], contiguous.
        rows: how many each member has.
        cycles: edge-disjoint, over all ranks of the group.
    """
    bounds = [[c * count // len(cycles) for c in range(len(cycles) + 1)] for count in rows]
    places = [cycle.index(group.rank) for cycle in cycles]
    current = [own[a:b] for a, b in pairwise(bounds[group.rank])]
    members = [group.rank] * len(cycles)
    for step in range(group.size):
        transfer = None
        coming = current
        sources = members
        if step < group.size - 1:
            sources = [cycle[at - step - 1] for cycle, at in zip(cycles, places, strict=True)]
            sizes = [bounds[m][c + 1] - bounds[m][c] for c, m in enumerate(sources)]
            coming = [own.new_empty((size, *own.shape[1:])) for size in sizes]
            transfer = _pass_on(group, cycles, current, coming)
        if step:
            for index, (member, kv) in enumerate(zip(members, current, strict=True)):
                yield Rows(member, bounds[member][index], kv)
        else:
            yield Rows(group.rank, 0, own)
        if transfer is not None:
            transfer.wait()
        current = coming
        members = sources


def _pass_on(
    group: SPGroup, cycles: list[Cycle], current: list[Tensor], coming: list[Tensor]
) -> Transfer:
    """On every cycle, to the next rank and from the one before; no two cycles share a link."""
    send = {}
    receive = {}
    for cycle, leaving, arriving in zip(cycles, current, coming, strict=True):
        at = cycle.index(group.rank)
        send[cycle[(at + 1) % group.size]] = leaving
        receive[cycle[at - 1]] = arriving
    return group.send_recv(send, receive, "ring")
