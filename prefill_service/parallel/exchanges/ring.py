"""How K and V circulate in a ring group: one ring, or edge-disjoint rings at once.

Ring attention with K and V moving (Ring Self-Attention, arXiv 2105.13120, with the online softmax
of arXiv 2310.01889), and TASP's several rings (arXiv 2509.26541). Both move every rank's rows to
every other rank once, ``2 * kv_heads * head_dim * bytes * tokens * (P-1)/P`` per rank and layer;
the rings differ in how many links are busy at a time. The next rows travel while the ones at hand
are attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from prefill_service.parallel.exchanges.cycles import hamiltonian_cycles
from prefill_service.parallel.process_group import SPGroup, Transfer


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


Circulate = Callable[[SPGroup, Tensor, list[int]], Iterator[Rows]]
"""All rows of all members, this rank's own first; every member of the ring iterates to the end."""


def one_ring(group: SPGroup, own: Tensor, rows: list[int]) -> Iterator[Rows]:
    """Everything to the next rank, P-1 times.

    Args:
        own: [rows, 2, kv_heads, head_dim], contiguous.
        rows: of each member.
    """
    yield from _circulate(group, own, rows, [list(range(group.size))])


def disjoint_rings(group: SPGroup, own: Tensor, rows: list[int]) -> Iterator[Rows]:
    """Each rank's rows cut in as many parts as there are rings, each part on its own ring.

    Where no such rings are known (4, 6, and even numbers over 8), one ring.
    """
    cycles = hamiltonian_cycles(group.size) if group.size > 1 else [[0]]
    yield from _circulate(group, own, rows, cycles)


def _circulate(
    group: SPGroup, own: Tensor, rows: list[int], cycles: list[list[int]]
) -> Iterator[Rows]:
    bounds = [[c * count // len(cycles) for c in range(len(cycles) + 1)] for count in rows]
    places = [cycle.index(group.rank) for cycle in cycles]
    current = [own[a:b] for a, b in pairwise(bounds[group.rank])]
    members = [group.rank] * len(cycles)
    for step in range(group.size):
        transfer, coming, sources = None, current, members
        if step < group.size - 1:
            sources = [cycle[at - step - 1] for cycle, at in zip(cycles, places, strict=True)]
            sizes = [bounds[m][c + 1] - bounds[m][c] for c, m in enumerate(sources)]
            coming = [own.new_empty((size, *own.shape[1:])) for size in sizes]
            transfer = _pass_on(group, cycles, places, current, coming)
        if step:
            for index, (member, kv) in enumerate(zip(members, current, strict=True)):
                yield Rows(member, bounds[member][index], kv)
        else:
            yield Rows(group.rank, 0, own)
        if transfer is not None:
            transfer.wait()
        current, members = coming, sources


def _pass_on(
    group: SPGroup,
    cycles: list[list[int]],
    places: list[int],
    current: list[Tensor],
    coming: list[Tensor],
) -> Transfer:
    """On every cycle, to the next rank and from the one before; no two cycles share a link."""
    send, receive = {}, {}
    for cycle, at, leaving, arriving in zip(cycles, places, current, coming, strict=True):
        send[cycle[(at + 1) % group.size]] = leaving
        receive[cycle[at - 1]] = arriving
    return group.send_recv(send, receive, "ring")
