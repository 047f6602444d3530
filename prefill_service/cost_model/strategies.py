"""An exchange on a number of ranks in a mesh, and which of them there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.exchanges.catalog import (
    EXCHANGES,
    GATHER,
    Conditions,
    ExchangeKind,
    MeshForm,
)
from prefill_service.parallel.token_order import Order


@dataclass(frozen=True, slots=True)
class Strategy:
    """An exchange on a number of ranks.

    Attributes:
        exchange: what moves.
        ranks: the sequence-parallel degree.
        ulysses: ranks that split heads among them; rank i has ring index ``i // ulysses``.
        sparse: attention of the prefix selects, where the exchange lets it.
    """

    exchange: ExchangeKind
    ranks: int
    ulysses: int = 1
    sparse: bool = False

    @property
    def ring(self) -> int:
        """Rings' length in the mesh of ``ulysses`` x ``ring``."""
        return self.ranks // self.ulysses

    @property
    def label(self) -> str:
        """Name with the mesh, where it is a choice."""
        name = str(self.exchange)
        return f"{name} {self.ulysses}x{self.ring}" if self.exchange.two_dimensional else name

    @property
    def order(self) -> Order:
        """How patches of a chunk are given to ranks."""
        return self.exchange.order

    @property
    def whole_kv_heads(self) -> bool:
        """Whether heads are split between KV heads, whose query heads select together."""
        splits = self.exchange.mesh is not MeshForm.COLUMN
        return self.exchange.whole_kv_heads or (self.sparse and splits and self.exchange.sparse)

    @property
    def selects(self) -> bool:
        """Whether attention can be sparse: where a rank has, or can ask for, any key it wants."""
        splits = self.exchange.mesh is not MeshForm.COLUMN
        return self.exchange.sparse and (self.whole_kv_heads or not splits)

    def with_density(self, density: float) -> Strategy:
        """The strategy that computes a prefix which attends to this share of the keys."""
        return replace(self, sparse=True) if self.exchange.sparse and density < 1 else self

    def unsuitable(self, shape: ModelShape, density: float, parallel_links: int) -> str | None:
        """Why this strategy cannot run at all, or not differ from a simpler one, or ``None``."""
        if self.ulysses > shape.q_heads:
            return f"{self.ulysses} ranks cannot share {shape.q_heads} query heads"
        if self.exchange.whole_kv_heads and self.ulysses > shape.kv_heads:
            return f"{self.ulysses} ranks cannot share {shape.kv_heads} KV heads"
        return self.exchange.unsuitable(Conditions(self.ranks, density, parallel_links))


def strategies(ranks: int, exchanges: Sequence[ExchangeKind] = EXCHANGES) -> Iterator[Strategy]:
    """All strategies of a degree; one rank exchanges nothing, and ``gather`` stands for all."""
    if ranks == 1:
        if GATHER in exchanges:
            yield Strategy(GATHER, 1)
        return
    for exchange in exchanges:
        for degree in _degrees(exchange, ranks):
            yield Strategy(exchange, ranks, degree)


def _degrees(exchange: ExchangeKind, ranks: int) -> list[int]:
    """Lengths of the mesh's rows, of a grid those that are neither a row nor a column."""
    match exchange.mesh:
        case MeshForm.COLUMN:
            return [1]
        case MeshForm.ROW:
            return [ranks]
        case MeshForm.GRID:
            return [degree for degree in range(2, ranks) if ranks % degree == 0]
