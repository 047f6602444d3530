"""Exchanges, and on how many ranks and in which mesh each of them can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from prefill_service.cost_model.chunking import Order
from prefill_service.cost_model.model_shape import ModelShape


class Exchange(StrEnum):
    """How keys and queries meet, the simplest first: ties are settled in this order."""

    GATHER = "gather"
    RING = "ring"
    ULYSSES = "ulysses"
    USP = "usp"
    PASS_Q = "pass_q"
    MULTI_RING = "multi_ring"
    DEMAND = "demand"
    ULYSSES_GATHER = "ulysses_gather"


@dataclass(frozen=True, slots=True)
class Scheme:
    """An exchange on a number of ranks.

    Attributes:
        exchange: what moves.
        ranks: the sequence-parallel degree.
        ulysses: ranks that split heads among them; rank i has ring index ``i // ulysses``.
        whole_groups: they split them by KV head, as ``ulysses`` does where attention selects, and
            ``ulysses_gather`` always.
    """

    exchange: Exchange
    ranks: int
    ulysses: int = 1
    whole_groups: bool = False

    @property
    def ring(self) -> int:
        """Rings' length in the mesh of ``ulysses`` x ``ring``."""
        return self.ranks // self.ulysses

    @property
    def label(self) -> str:
        """Name with the mesh, where it is a choice."""
        if self.exchange in (Exchange.USP, Exchange.ULYSSES_GATHER):
            return f"{self.exchange} {self.ulysses}x{self.ring}"
        return str(self.exchange)

    @property
    def order(self) -> Order:
        """How patches of a chunk are given to ranks: zigzag where only that keeps work even."""
        circulates = (Exchange.RING, Exchange.USP, Exchange.PASS_Q, Exchange.MULTI_RING)
        return Order.ZIGZAG if self.exchange in circulates else Order.DEALT

    @property
    def selects(self) -> bool:
        """Whether attention can be sparse: where a rank has, or can ask for, any key it wants."""
        return self.exchange in (Exchange.GATHER, Exchange.DEMAND) or self.whole_groups

    def at(self, density: float) -> Scheme:
        """As it computes a prefix that attends to such a share of the keys."""
        selects = self.exchange is Exchange.ULYSSES and density < 1
        whole = selects or self.exchange is Exchange.ULYSSES_GATHER
        return replace(self, whole_groups=True) if whole else self

    def unsuitable(self, shape: ModelShape, density: float, parallel_links: int) -> str | None:
        """Why this scheme cannot run at all, or not differ from a simpler one, or ``None``."""
        if self.ulysses > shape.q_heads:
            return f"{self.ulysses} ranks cannot share {shape.q_heads} query heads"
        if self.exchange is Exchange.ULYSSES_GATHER and self.ulysses > shape.kv_heads:
            return f"{self.ulysses} ranks cannot share {shape.kv_heads} KV heads"
        if self.exchange is Exchange.MULTI_RING and not has_disjoint_rings(self.ranks):
            exist = "none exist" if self.ranks in (4, 6) else "none are known here"
            return (
                f"needs edge-disjoint Hamiltonian cycles; for {self.ranks} ranks {exist}: use ring"
            )
        if self.exchange is Exchange.MULTI_RING and parallel_links == 1:
            return "needs several links per rank (--parallel-links); on one it is a ring"
        if self.exchange is Exchange.DEMAND and density >= 1:
            return f"density {density:g}: nothing is selected, every block is in demand"
        return None


def schemes(ranks: int) -> Iterator[Scheme]:
    """All schemes of a degree; on one rank nothing is exchanged and ``gather`` stands for all."""
    yield Scheme(Exchange.GATHER, ranks)
    if ranks == 1:
        return
    for exchange in (Exchange.RING, Exchange.PASS_Q, Exchange.MULTI_RING, Exchange.DEMAND):
        yield Scheme(exchange, ranks)
    yield Scheme(Exchange.ULYSSES, ranks, ranks)
    for ulysses in range(2, ranks):
        if ranks % ulysses == 0:
            yield Scheme(Exchange.USP, ranks, ulysses)
            yield Scheme(Exchange.ULYSSES_GATHER, ranks, ulysses, whole_groups=True)


def has_disjoint_rings(ranks: int) -> bool:
    """Whether ``ranks - 1`` edge-disjoint Hamiltonian cycles are built (TASP, arXiv 2509.26541).

    They exist for all but 4 and 6; of the even ones, only those of 2 and 8 are built.
    """
    return ranks % 2 == 1 or ranks in (2, 8)


def split_heads(
    shape: ModelShape, parts: int, whole_groups: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query heads of each part, in runs as even as possible, and the KV heads each run reads.

    KV heads that two runs read are replicated, so the second may sum to more than there are.

    Args:
        whole_groups: no two runs read the same; some may then be empty.

    Raises:
        ValueError: more parts than query heads.
    """
    if parts > shape.q_heads:
        raise ValueError(f"{parts} ranks cannot share {shape.q_heads} query heads")
    group = shape.q_heads // shape.kv_heads
    unit = group if whole_groups else 1
    each, rest = divmod(shape.q_heads // unit, parts)
    index = np.arange(parts + 1)
    bounds = unit * (index * each + np.minimum(index, rest))
    return np.diff(bounds), -(-bounds[1:] // group) - bounds[:-1] // group
