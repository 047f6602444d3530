"""The process mesh, Ulysses x ring, with its sub-groups (USP, arXiv 2405.07719).

Rank ``i`` stands at ring index ``i // U`` and Ulysses index ``i % U``: the ranks that exchange
heads, which moves more bytes, are neighbours, so on machines of several nodes they share a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from prefill_service.parallel.group import SPGroup


@dataclass(frozen=True, slots=True)
class SPMesh:
    """All ranks of a group as a grid.

    Attributes:
        world: all of them.
        ulysses: this rank's row: the ranks that share a part of the sequence and split heads.
        ring: this rank's column: the ranks that hold the same heads of other parts.
    """

    world: SPGroup
    ulysses: SPGroup
    ring: SPGroup

    def world_rank(self, ring: int, ulysses: int) -> int:
        """The rank at a place of the grid."""
        return ring * self.ulysses.size + ulysses


def form_meshes(world: SPGroup, timeout_s: float) -> dict[int, SPMesh]:
    """The meshes of all Ulysses degrees that divide the group, their sub-groups built once.

    Choosing among them later costs nothing. Every rank calls this, at the same point.

    Returns:
        Ulysses degree to mesh.
    """
    size = world.size
    return {u: _form(world, u, timeout_s) for u in range(1, size + 1) if size % u == 0}


def _form(world: SPGroup, ulysses: int, timeout_s: float) -> SPMesh:
    alone = SPGroup(0, 1, None, None, world.meter, world.staged)
    if ulysses == 1:
        return SPMesh(world, alone, world)
    if ulysses == world.size:
        return SPMesh(world, world, alone)
    rows = [list(range(first, first + ulysses)) for first in range(0, world.size, ulysses)]
    columns = [list(range(first, world.size, ulysses)) for first in range(ulysses)]
    return SPMesh(world, _join(world, rows, timeout_s), _join(world, columns, timeout_s))


def _join(world: SPGroup, members: list[list[int]], timeout_s: float) -> SPGroup:
    """The sub-group this rank is in. Every rank takes part in building all of them."""
    mine = None
    for ranks in members:
        group = dist.new_group(ranks, timeout=timedelta(seconds=timeout_s))
        if world.rank in ranks:
            mine = SPGroup(
                ranks.index(world.rank), len(ranks), group, None, world.meter, world.staged
            )
    assert mine is not None, "every rank is in one row and one column"
    return mine
