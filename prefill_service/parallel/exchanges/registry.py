"""The exchanges by name, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.demand.exchange import DemandExchange
from prefill_service.parallel.exchanges.gather import GatherExchange
from prefill_service.parallel.exchanges.pass_q import PassQExchange
from prefill_service.parallel.exchanges.ring import disjoint_rings, one_ring
from prefill_service.parallel.exchanges.ulysses_gather import UlyssesGatherExchange
from prefill_service.parallel.exchanges.usp import UspExchange
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.token_layout import Order


class ExchangeKind(StrEnum):
    """How queries meet the keys and values of other ranks; all are exact."""

    GATHER = "gather"
    RING = "ring"
    ULYSSES = "ulysses"
    USP = "usp"
    PASS_Q = "pass_q"
    MULTI_RING = "multi_ring"
    DEMAND = "demand"
    ULYSSES_GATHER = "ulysses_gather"

    @property
    def order(self) -> Order:
        """The layout that keeps its causal work even."""
        return Order.DEALT if self.sparse else Order.ZIGZAG

    @property
    def sparse(self) -> bool:
        """Selected blocks can be attended to; the others compute every prefix exactly."""
        circulates = (
            ExchangeKind.RING, ExchangeKind.USP, ExchangeKind.PASS_Q, ExchangeKind.MULTI_RING
        )  # fmt: skip
        return self not in circulates

    @property
    def two_dimensional(self) -> bool:
        """The mesh's rows can be of several lengths."""
        return self in (ExchangeKind.USP, ExchangeKind.ULYSSES_GATHER)

    @property
    def offloads(self) -> bool:
        """Its buffers can be elsewhere (``KVBuffers``)."""
        return self is ExchangeKind.GATHER


def ulysses_degree(
    kind: ExchangeKind, ranks: int, q_heads: int, kv_heads: int, wanted: int = 0
) -> int:
    """Ranks of a row of the mesh.

    Args:
        wanted: of a two-dimensional exchange; 0: the largest divisor of the ranks, themselves
            excluded if possible, that the heads allow.

    Raises:
        ValueError: a degree that does not divide the ranks, or exceeds the query heads (the KV
            heads, where these are not divided further).
    """
    whole = kind is ExchangeKind.ULYSSES_GATHER
    heads, what = (kv_heads, "KV heads") if whole else (q_heads, "query heads")
    if kind is ExchangeKind.ULYSSES:
        degree = ranks
    elif not kind.two_dimensional:
        degree = 1
    elif wanted:
        degree = wanted
        if ranks % degree:
            raise ValueError(f"a Ulysses degree of {degree} does not divide {ranks} ranks")
    else:
        inner = [u for u in range(2, ranks) if ranks % u == 0 and u <= heads]
        degree = max(inner, default=ranks if ranks <= heads else 1)
    if degree > heads:
        raise ValueError(f"a Ulysses degree of {degree} exceeds the model's {heads} {what}")
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
        whole = self.kind is ExchangeKind.ULYSSES_GATHER
        split = HeadSplit(q_heads, kv_heads, self.degree, whole)
        most = max(len(range(kv_heads)[split.keys(part)]) for part in range(self.degree))
        return (1 if whole else ranks // self.degree) * (kv_heads // most)

    def __str__(self) -> str:
        """Name, and the mesh's row where it is a choice."""
        return f"{self.kind} {self.degree}" if self.kind.two_dimensional else self.kind


def choose_exchange(
    kind: ExchangeKind, ranks: int, q_heads: int, kv_heads: int, wanted: int = 0
) -> ExchangeChoice:
    """An exchange with its degree; arguments and errors of ``ulysses_degree``."""
    return ExchangeChoice(kind, ulysses_degree(kind, ranks, q_heads, kv_heads, wanted))


def make_exchange(kind: ExchangeKind, setup: ExchangeSetup) -> Exchange:
    """An exchange for one prompt."""
    mesh, layout, shape = setup.mesh, setup.layout, setup.shape
    match kind:
        case ExchangeKind.GATHER:
            return GatherExchange.build(setup)
        case ExchangeKind.DEMAND:
            return DemandExchange(mesh.world, layout, shape, setup.settings.segments)
        case ExchangeKind.PASS_Q:
            return PassQExchange(mesh.world, layout, shape)
        case ExchangeKind.MULTI_RING:
            return UspExchange(mesh, layout, shape, disjoint_rings)
        case ExchangeKind.ULYSSES_GATHER:
            return UlyssesGatherExchange(mesh, shape)
        case ExchangeKind.ULYSSES if setup.selects:
            return UlyssesGatherExchange(mesh, shape)  # its one row, and heads cut as that needs
        case _:
            return UspExchange(mesh, layout, shape, one_ring)
