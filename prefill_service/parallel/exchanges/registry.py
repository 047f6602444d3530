"""An exchange for a number of ranks and a model, chosen by name and built by what the name says."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from prefill_service.parallel.exchanges.base import Exchange, ExchangeSetup
from prefill_service.parallel.exchanges.catalog import GATHER, ExchangeKind, MeshForm
from prefill_service.parallel.head_partition import HeadSplit


@dataclass(frozen=True, slots=True)
class ExchangeChoice:
    """One exchange on one mesh.

    Attributes:
        degree: ranks of a row of the mesh (``ulysses_degree``).
    """

    kind: ExchangeKind = GATHER
    degree: int = 1

    def kv_shards(self, ranks: int, q_heads: int, kv_heads: int) -> int:
        """Ranks that divide K and V among them; 1: each has room for all.

        Of heads that they cannot divide evenly, the rank with the most counts.
        """
        split = HeadSplit(q_heads, kv_heads, self.degree, self.kind.whole_kv_heads)
        most = max(len(range(kv_heads)[split.keys(part)]) for part in range(self.degree))
        rows = 1 if self.kind.all_tokens else ranks // self.degree
        return rows * (kv_heads // most)

    def __str__(self) -> str:
        """Name, and the mesh's row where it is a choice."""
        return f"{self.kind} {self.degree}" if self.kind.two_dimensional else str(self.kind)


def ulysses_degree(
    kind: ExchangeKind, ranks: int, *, q_heads: int, kv_heads: int, wanted: int = 0
) -> int:
    """Ranks of a row of the mesh.

    Args:
        wanted: of a two-dimensional exchange; 0: the largest divisor of the ranks, themselves
            excluded if possible, that the heads allow.

    Raises:
        ValueError: a degree that does not divide the ranks, or exceeds the query heads (the KV
            heads, where these are not divided further).
    """
    heads, what = (kv_heads, "KV heads") if kind.whole_kv_heads else (q_heads, "query heads")
    if kind.mesh is MeshForm.ROW:
        degree = ranks
    elif kind.mesh is MeshForm.COLUMN:
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


def choose_exchange(
    kind: ExchangeKind, ranks: int, *, q_heads: int, kv_heads: int, wanted: int = 0
) -> ExchangeChoice:
    """An exchange with its degree; arguments and errors of ``ulysses_degree``."""
    degree = ulysses_degree(kind, ranks, q_heads=q_heads, kv_heads=kv_heads, wanted=wanted)
    return ExchangeChoice(kind, degree)


def make_exchange(kind: ExchangeKind, setup: ExchangeSetup) -> Exchange:
    """The exchange for one prompt, on a mesh of its degree."""
    name = (setup.selects and kind.sparse_implementation) or kind.implementation
    module, _, attribute = name.partition(":")
    implementation: type[Exchange] = getattr(import_module(module), attribute)
    return implementation.build(setup)
