"""What is searched for, the candidates, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefill_service.attention_shape import BLOCK_TOKENS, TILE_TOKENS
from prefill_service.cost_model.strategies import Strategy
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.exchanges.catalog import EXCHANGES, ExchangeKind
from prefill_service.parallel.exchanges.cost_terms import TrafficOptions

CHUNK_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """A prefix, the ranks and the memory that there are for it, and what may be chosen.

    Attributes:
        shape: of the model.
        tokens: of the prompt.
        max_ranks: ranks there are; fewer may be used.
        min_ranks: that have to be used.
        kv_memory_bytes: for K, V and exchange buffers on each rank.
        density: share of the (query, key) pairs that attention computes, 1 if exact; of exchanges
            under which it can select (``Strategy.selects``).
        parallel_links: see ``work.prefill_work``.
        chunk_tokens: chunk sizes per rank to choose from.
        exchanges: to choose from.
        demand_share: see ``TrafficOptions``; ``None``: as if a rank's tiles of queries selected
            independently of each other, which they do not, so that it is an upper bound.
        block_tokens: keys of a block of sparse attention.

    Raises:
        ValueError: a value that is not accepted, named with what is.
    """

    shape: ModelShape
    tokens: int
    max_ranks: int
    kv_memory_bytes: float
    density: float = 1.0
    parallel_links: int = 1
    chunk_tokens: Sequence[int] = CHUNK_TOKENS
    exchanges: Sequence[ExchangeKind] = EXCHANGES
    demand_share: float | None = None
    min_ranks: int = 1
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        for name in ("tokens", "max_ranks", "parallel_links", "block_tokens"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("min_ranks", self.min_ranks, 1 <= self.min_ranks <= self.max_ranks, "1 to max_ranks")
        _check("kv_memory_bytes", self.kv_memory_bytes, self.kv_memory_bytes > 0, "more than 0")
        _check("density", self.density, 0 < self.density <= 1, "0 < density <= 1")
        share = self.demand_share
        _check("demand_share", share, share is None or 0 <= share <= 1, "0 to 1")
        for size in self.chunk_tokens:
            _check("chunk_tokens", size, size >= 1, "1 or more")
        for name in ("chunk_tokens", "exchanges"):
            _check(name, getattr(self, name), len(getattr(self, name)) > 0, "at least one")

    def options(self, chunk_tokens: int) -> TrafficOptions:
        """What the exchanges' formulas leave open, for one chunk size."""
        share = self.demand_share
        if share is None:
            tile_tokens = max(TILE_TOKENS, self.block_tokens)
            share = 1 - (1 - self.density) ** -(-chunk_tokens // tile_tokens)
        return TrafficOptions(share, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to do it.

    Attributes:
        strategy: exchange, ranks and mesh.
        chunk_tokens: per rank.
        seconds: predicted for the whole prefill.
        transfer_seconds: predicted of transfers, hidden ones included.
        exposed_seconds: of them, what the slowest ranks wait for.
        bytes_received: over all layers and chunks, by the rank that receives most.
        memory_bytes: K, V and buffers on the fullest rank.
        rejected: why it cannot be chosen; ``None`` if it can. Where the strategy cannot run at all,
            the numbers are 0.
    """

    strategy: Strategy
    chunk_tokens: int
    seconds: float = 0.0
    transfer_seconds: float = 0.0
    exposed_seconds: float = 0.0
    bytes_received: int = 0
    memory_bytes: int = 0
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The chosen candidate, why it is chosen, and all others.

    Attributes:
        chosen: the best candidate.
        reason: a sentence or two for people.
        candidates: all of them, those that can be chosen first, the fastest first.
    """

    chosen: Candidate
    reason: str
    candidates: tuple[Candidate, ...]


def _check(name: str, value: object, ok: bool, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {value!r} is not accepted; expected {accepted}")
