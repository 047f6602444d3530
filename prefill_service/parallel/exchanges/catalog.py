"""The exchanges: what each is called, what it can do, what it moves and keeps, who published it.

This is the only list. Configuration, help, cost model, documentation and tests go through it, and
it imports neither torch nor numpy, so that they may. An implementation is named, and imported when
it is built (``registry.make_exchange``); docs/extending.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from prefill_service.parallel.exchanges.ring import hamiltonian_cycles
from prefill_service.parallel.token_order import Order

if TYPE_CHECKING:
    from prefill_service.parallel.exchanges.cost_terms import CostTerms, Traffic

_PACKAGE = "prefill_service.parallel.exchanges"


class MeshForm(Enum):
    """Which ranks split heads: a mesh's rows do, of so many ranks."""

    COLUMN = auto()
    """One: no rank splits heads."""
    ROW = auto()
    """All."""
    GRID = auto()
    """A number that is chosen, the Ulysses degree."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which an exchange is considered.

    Attributes:
        ranks: that compute the prefix.
        density: share of the (query, key) pairs that attention computes, 1 if exact.
        parallel_links: other ranks from which a rank receives at once at full speed.
    """

    ranks: int
    density: float
    parallel_links: int


def _always_suitable(_: Conditions) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeKind:
    """One exchange; two of the same name are equal.

    Attributes:
        name: in configuration, requests and results.
        description: what moves, in half a line.
        bytes_received: per rank and layer, of N tokens in one chunk on P ranks with even shares,
            h_q query heads and h_kv KV heads of size d, and e bytes an element.
        more_chunks: what changes with the same tokens in more chunks.
        keeps: K and V on a rank.
        paper: where it was published.
        implementation: ``module:class`` of an ``Exchange``.
        sparse_implementation: the same for prefixes with sparse attention, where that is another.
        traffic: what it moves.
        memory: bytes of K, V and an exchange's buffers on the fullest rank.
        unsuitable: why it cannot run, or not differ from a simpler one; ``None`` where it can.
        order: the layout that keeps its causal work even.
        mesh: which ranks split heads.
        whole_kv_heads: they split them between KV heads, also where attention is exact.
        sparse: selected blocks can be attended to; without it every prefix is computed exactly.
        all_tokens: a rank has room for K and V of all tokens, if perhaps of some heads.
        offloads: its buffers can be elsewhere (``KVBuffers``).
        balances: ranks attend to some of each other's selected blocks (``LoadBalancer``).
        predictable: what it moves is known before the prefix is computed.
    """

    name: str
    description: str = field(compare=False)
    bytes_received: str = field(compare=False)
    more_chunks: str = field(compare=False)
    keeps: str = field(compare=False)
    paper: str = field(compare=False)
    implementation: str = field(compare=False)
    sparse_implementation: str = field(default="", compare=False)
    traffic: Callable[[CostTerms], Traffic] = field(compare=False)
    memory: Callable[[CostTerms], int] = field(compare=False)
    unsuitable: Callable[[Conditions], str | None] = field(default=_always_suitable, compare=False)
    order: Order = field(default=Order.DEALT, compare=False)
    mesh: MeshForm = field(default=MeshForm.COLUMN, compare=False)
    whole_kv_heads: bool = field(default=False, compare=False)
    sparse: bool = field(default=False, compare=False)
    all_tokens: bool = field(default=False, compare=False)
    offloads: bool = field(default=False, compare=False)
    balances: bool = field(default=False, compare=False)
    predictable: bool = field(default=True, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def two_dimensional(self) -> bool:
        """Whether the mesh's rows can be of several lengths."""
        return self.mesh is MeshForm.GRID


# ---- formulas ------------------------------------------------------------------------------


def _gathering_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(exposed=terms.heads_to_all(), hidden=terms.broadcasts())


def _gathering_memory(terms: CostTerms) -> int:
    """K and V are received into their final place; heads are swapped in buffers of a layer."""
    swapped = int(terms.heads_to_all().received.max())
    return terms.shape.attending_layers * terms.all_keys_bytes() + swapped


def _circulating_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(exposed=terms.heads_to_all(), hidden=terms.circulation())


def _many_rings_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(hidden=terms.circulation(rings=terms.ranks - 1))


def _circulating_memory(terms: CostTerms) -> int:
    """One layer has two shards more: the one being attended to and the one arriving."""
    moving = 2 if terms.ring > 1 else 0
    swapped = int(terms.heads_to_all().received.max())
    return (terms.shape.attending_layers + moving) * terms.own_keys_bytes() + swapped


def _pass_q_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(exposed=terms.last_results(), hidden=terms.queries())


def _pass_q_memory(terms: CostTerms) -> int:
    arriving = int((terms.last_results().received + terms.queries().received).max())
    return terms.shape.attending_layers * terms.own_keys_bytes() + arriving


def _demand_traffic(terms: CostTerms) -> Traffic:
    return terms.traffic(exposed=terms.selected_blocks())


def _demand_memory(terms: CostTerms) -> int:
    """Every rank keeps the summaries of all blocks."""
    per_layer = terms.own_keys_bytes() + terms.summaries_bytes()
    arriving = int(terms.selected_blocks().received.max())
    return terms.shape.attending_layers * per_layer + arriving


def _without_disjoint_rings(conditions: Conditions) -> str | None:
    ranks = conditions.ranks
    if len(hamiltonian_cycles(ranks)) < ranks - 1:
        exist = "none exist" if ranks in (4, 6) else "none are known here"
        return f"needs edge-disjoint Hamiltonian cycles; for {ranks} ranks {exist}: use ring"
    if conditions.parallel_links == 1:
        return "needs several links per rank (--parallel-links); on one it is a ring"
    return None


def _without_selection(conditions: Conditions) -> str | None:
    if conditions.density >= 1:
        return f"density {conditions.density:g}: nothing is selected, every block is in demand"
    return None


# ---- the list ------------------------------------------------------------------------------

GATHER = ExchangeKind(
    name="gather",
    description="K and V to all ranks, a broadcast from each into the final place",
    bytes_received="2 h_kv d e N (P-1)/P",
    more_chunks="the same",
    keeps="all",
    paper="LSS Transformer, 2311.02382; LASP-2H, 2502.07563",
    implementation=f"{_PACKAGE}.gather:GatherExchange",
    traffic=_gathering_traffic,
    memory=_gathering_memory,
    sparse=True,
    all_tokens=True,
    offloads=True,
    balances=True,
)

RING = ExchangeKind(
    name="ring",
    description="K and V round a ring",
    bytes_received="2 h_kv d e N (P-1)/P",
    more_chunks="all that is held, with every chunk",
    keeps="1/P",
    paper="Ring Self-Attention, 2105.13120",
    implementation=f"{_PACKAGE}.usp:UspExchange",
    traffic=_circulating_traffic,
    memory=_circulating_memory,
    order=Order.ZIGZAG,
)

ULYSSES = ExchangeKind(
    name="ulysses",
    description="heads for tokens, and back",
    bytes_received="(2 h_q + 2 h_kv) d e N (P-1)/P²",
    more_chunks="the same",
    keeps="all tokens, 1/P of the heads",
    paper="DeepSpeed-Ulysses, 2309.14509",
    implementation=f"{_PACKAGE}.usp:UspExchange",
    sparse_implementation=f"{_PACKAGE}.ulysses_gather:UlyssesGatherExchange",
    traffic=_circulating_traffic,
    memory=_circulating_memory,
    mesh=MeshForm.ROW,
    sparse=True,
    all_tokens=True,
)

USP = ExchangeKind(
    name="usp",
    description="Ulysses in rows of U ranks, a ring in columns of R",
    bytes_received="(2 h_q + 2 h_kv) d e (N/P)(U-1)/U + 2 h_kv d e N (R-1)/P",
    more_chunks="the ring's part again",
    keeps="1/P",
    paper="USP, 2405.07719",
    implementation=f"{_PACKAGE}.usp:UspExchange",
    traffic=_circulating_traffic,
    memory=_circulating_memory,
    order=Order.ZIGZAG,
    mesh=MeshForm.GRID,
)

PASS_Q = ExchangeKind(
    name="pass_q",
    description="queries round a ring, results back",
    bytes_received="h_q (2d+1) e N (P-1)/P; the 1 has 4 bytes at least",
    more_chunks="the same",
    keeps="1/P",
    paper="TokenRing, 2412.20501",
    implementation=f"{_PACKAGE}.pass_q:PassQExchange",
    traffic=_pass_q_traffic,
    memory=_pass_q_memory,
    order=Order.ZIGZAG,
)

MULTI_RING = ExchangeKind(
    name="multi_ring",
    description="K and V in parts, each round one of P-1 edge-disjoint rings",
    bytes_received="2 h_kv d e N (P-1)/P",
    more_chunks="all that is held, with every chunk",
    keeps="1/P",
    paper="TASP, 2509.26541",
    implementation=f"{_PACKAGE}.usp:MultiRingExchange",
    traffic=_many_rings_traffic,
    memory=_circulating_memory,
    unsuitable=_without_disjoint_rings,
    order=Order.ZIGZAG,
)

DEMAND = ExchangeKind(
    name="demand",
    description="summaries of all blocks, and the blocks that queries select",
    bytes_received="depends on what is selected",
    more_chunks="each block once or twice",
    keeps="own, and room for all",
    paper="this project",
    implementation=f"{_PACKAGE}.demand.exchange:DemandExchange",
    traffic=_demand_traffic,
    memory=_demand_memory,
    unsuitable=_without_selection,
    sparse=True,
    all_tokens=True,
    predictable=False,
)

ULYSSES_GATHER = ExchangeKind(
    name="ulysses_gather",
    description="Ulysses in rows of U ranks, `gather` in columns of R",
    bytes_received="(2 h_q + 2 h_kv) d e (N/P)(U-1)/U + 2 h_kv d e N (R-1)/P",
    more_chunks="the same",
    keeps="all tokens, 1/U of the heads",
    paper="USP, 2405.07719, with LASP-2H, 2502.07563",
    implementation=f"{_PACKAGE}.ulysses_gather:UlyssesGatherExchange",
    traffic=_gathering_traffic,
    memory=_gathering_memory,
    mesh=MeshForm.GRID,
    whole_kv_heads=True,
    sparse=True,
    all_tokens=True,
)

EXCHANGES = (GATHER, RING, ULYSSES, USP, PASS_Q, MULTI_RING, DEMAND, ULYSSES_GATHER)
"""All of them, the simplest first: the search settles ties in this order."""


def exchange_named(name: str) -> ExchangeKind:
    """The exchange of that name.

    Raises:
        ValueError: there is none; names those there are.
    """
    for kind in EXCHANGES:
        if kind.name == name:
            return kind
    known = ", ".join(kind.name for kind in EXCHANGES)
    raise ValueError(f"exchange {name!r} is not known; known are {known}")
