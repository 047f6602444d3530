"""The process mesh, Ulysses x ring, with its sub-groups (USP, arXiv 2405.07719).

Rank ``i`` stands at ring index ``i // U`` and Ulysses index ``i % U``: the ranks that exchange
heads, which moves more bytes, are neighbours, so on machines of several nodes they share a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.subgroups import Subgroup


@dataclass(frozen=True, slots=True)
class SPMesh:
    """All ranks of a group as a grid.

    Attributes:
        world: all ranks of the group, or of the subgroup that the mesh is for.
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
    return form_subgroup_meshes(world, [Subgroup(0, world.size)], timeout_s)[
        Subgroup(0, world.size)
    ]


def form_subgroup_meshes(
    world: SPGroup, subgroups: Iterable[Subgroup], timeout_s: float
) -> dict[Subgroup, dict[int, SPMesh]]:
    """``form_meshes`` of several subgroups of ranks.

    Every rank takes part in building all of them, since torch wants that of its groups.

    Returns:
        For each subgroup that this rank is in, Ulysses degree to mesh.
    """
    builder = _Builder(world, timeout_s)
    found = {}
    for subgroup in subgroups:
        degrees = [u for u in range(1, subgroup.size + 1) if subgroup.size % u == 0]
        meshes = {u: builder.mesh(subgroup, u) for u in degrees}
        if world.rank in subgroup.members:
            found[subgroup] = meshes
    return found


class _Builder:
    """Builds groups of ranks, each once, however many meshes it is part of."""

    def __init__(self, world: SPGroup, timeout_s: float) -> None:
        self._world = world
        self._timeout = timedelta(seconds=timeout_s)
        self._built: dict[tuple[int, ...], SPGroup] = {tuple(range(world.size)): world}

    def mesh(self, subgroup: Subgroup, ulysses: int) -> SPMesh:
        """Build the subgroup's mesh. On a rank outside it, its groups have no process group."""
        members = list(subgroup.members)
        rows = [members[at : at + ulysses] for at in range(0, subgroup.size, ulysses)]
        columns = [members[at::ulysses] for at in range(ulysses)]
        return SPMesh(
            world=self._group([members]), ulysses=self._group(rows), ring=self._group(columns)
        )

    def _group(self, candidates: list[list[int]]) -> SPGroup:
        """The candidate that this rank is in. Every rank takes part in building all of them."""
        mine = replace(self._world, rank=0, size=1, data=None, control=None)
        for ranks in candidates:
            if len(ranks) > 1:
                group = self._join(ranks)
                mine = group if self._world.rank in ranks else mine
        return mine

    def _join(self, ranks: list[int]) -> SPGroup:
        key = tuple(ranks)
        world = self._world
        if key not in self._built:
            data = dist.new_group(ranks, timeout=self._timeout)
            control = data
            if world.control is not world.data:  # which is NCCL's, so that agreeing needs gloo
                control = dist.new_group(ranks, timeout=self._timeout, backend="gloo")
            place = ranks.index(world.rank) if world.rank in ranks else 0
            self._built[key] = replace(
                world, rank=place, size=len(ranks), data=data, control=control
            )
        return self._built[key]
