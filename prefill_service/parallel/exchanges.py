"""The exchanges by name, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from prefill_service.attention.keys import Segments
from prefill_service.parallel.cycles import hamiltonian_cycles
from prefill_service.parallel.demand import DemandExchange
from prefill_service.parallel.exchange import AttentionShape, Exchange
from prefill_service.parallel.gather import GatherExchange
from prefill_service.parallel.heads import HeadSplit
from prefill_service.parallel.layout import ChunkLayout, Order
from prefill_service.parallel.mesh import SPMesh
from prefill_service.parallel.pass_q import PassQExchange
from prefill_service.parallel.ring import disjoint_rings, one_ring
from prefill_service.parallel.usp import UspExchange
from prefill_service.parallel.working import WorkingLayers


class ExchangeKind(StrEnum):
    """How queries meet the keys and values of other ranks; all are exact."""

    GATHER = "gather"
    RING = "ring"
    ULYSSES = "ulysses"
    USP = "usp"
    PASS_Q = "pass_q"
    MULTI_RING = "multi_ring"
    DEMAND = "demand"

    @property
    def order(self) -> Order:
        """The layout that keeps its causal work even."""
        dealt = self in (ExchangeKind.GATHER, ExchangeKind.ULYSSES, ExchangeKind.DEMAND)
        return Order.DEALT if dealt else Order.ZIGZAG

    @property
    def sparse(self) -> bool:
        """Selected blocks can be attended to; the others compute every prefix exactly."""
        return self in (ExchangeKind.GATHER, ExchangeKind.DEMAND, ExchangeKind.ULYSSES)

    @property
    def offloads(self) -> bool:
        """Its buffers can be elsewhere (``WorkingLayers``)."""
        return self is ExchangeKind.GATHER


def ulysses_degree(kind: ExchangeKind, ranks: int, q_heads: int, wanted: int = 0) -> int:
    """Ranks of a row of the mesh.

    Args:
        wanted: for ``usp``; 0: the largest divisor of the ranks, themselves excluded if possible,
            that the query heads allow.

    Raises:
        ValueError: a degree that does not divide the ranks, or exceeds the query heads.
    """
    if kind is ExchangeKind.ULYSSES:
        degree = ranks
    elif kind is not ExchangeKind.USP:
        degree = 1
    elif wanted:
        degree = wanted
        if ranks % degree:
            raise ValueError(f"a Ulysses degree of {degree} does not divide {ranks} ranks")
    else:
        inner = [u for u in range(2, ranks) if ranks % u == 0 and u <= q_heads]
        degree = max(inner, default=ranks if ranks <= q_heads else 1)
    if degree > q_heads:
        raise ValueError(f"a Ulysses degree of {degree} exceeds the model's {q_heads} query heads")
    return degree


@dataclass(frozen=True, slots=True)
class ExchangeChoice:
    """One exchange on one mesh.

    Attributes:
        degree: ranks of a row of the mesh (``ulysses_degree``).
    """

    kind: ExchangeKind = ExchangeKind.GATHER
    degree: int = 1

    def sharers(self, ranks: int, q_heads: int, kv_heads: int) -> int:
        """Ranks that divide K and V among them; 1: each has room for all.

        Of heads that they cannot divide evenly, the rank with the most counts.
        """
        if self.kind in (ExchangeKind.GATHER, ExchangeKind.DEMAND):
            return 1
        split = HeadSplit(q_heads, kv_heads, self.degree)
        most = max(len(range(kv_heads)[split.keys(part)]) for part in range(self.degree))
        return ranks // self.degree * (kv_heads // most)

    def __str__(self) -> str:
        """Name, and for ``usp`` the mesh's row."""
        return f"{self.kind} {self.degree}" if self.kind is ExchangeKind.USP else self.kind


def choose_exchange(kind: ExchangeKind, ranks: int, q_heads: int, wanted: int) -> ExchangeChoice:
    """An exchange with its degree; arguments and errors of ``ulysses_degree``."""
    return ExchangeChoice(kind, ulysses_degree(kind, ranks, q_heads, wanted))


def uses_disjoint_rings(ranks: int) -> bool:
    """Whether ``multi_ring`` has more than one ring to use with so many ranks."""
    return ranks > 2 and len(hamiltonian_cycles(ranks)) > 1


def make_exchange(
    choice: ExchangeChoice,
    meshes: Mapping[int, SPMesh],
    layout: ChunkLayout,
    shape: AttentionShape,
    segments: Segments,
    working: WorkingLayers | None = None,
    sparse: bool = False,
) -> Exchange:
    """An exchange for one prompt.

    Args:
        meshes: by Ulysses degree (``form_meshes``).
        layout: of the prompt, in the exchange's order.
        segments: sizes of sparse attention.
        working: buffers of an exchange that ``offloads``; without it, all are on the device.
        sparse: some queries of the prompt are attended to sparsely.
    """
    mesh = meshes[choice.degree]
    match choice.kind:
        case ExchangeKind.GATHER:
            return GatherExchange(mesh.world, shape, working)
        case ExchangeKind.DEMAND:
            return DemandExchange(mesh.world, layout, shape, segments)
        case ExchangeKind.PASS_Q:
            return PassQExchange(mesh.world, layout, shape)
        case ExchangeKind.MULTI_RING:
            return UspExchange(mesh, layout, shape, disjoint_rings)
        case ExchangeKind.ULYSSES:
            return UspExchange(mesh, layout, shape, one_ring, whole_groups=sparse)
        case _:
            return UspExchange(mesh, layout, shape, one_ring)
