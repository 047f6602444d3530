"""What a rank does in a chunk, in the units of the cost model: FLOPs, bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from prefill_service.cost_model.strategies import Strategy
from prefill_service.cost_model.traffic import DEFAULT_OPTIONS, cost_terms
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import Chunking, Floats, Ints
from prefill_service.parallel.exchanges.cost_terms import CostTerms, Stream, TrafficOptions

Amount = float | NDArray[np.float64]
"""One number, or one for each chunk, or for each chunk and rank."""


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts of everything that takes time; all fields of one shape, or plain numbers.

    Attributes:
        passes: layers run.
        linear_flops, attention_flops: the latter of what attention's density leaves.
        exposed_bytes, exposed_calls: transfers that nothing hides, over the busiest link.
        hidden_bytes, hidden_calls: transfers that go on under the attention.
    """

    passes: Amount = 0.0
    linear_flops: Amount = 0.0
    attention_flops: Amount = 0.0
    exposed_bytes: Amount = 0.0
    exposed_calls: Amount = 0.0
    hidden_bytes: Amount = 0.0
    hidden_calls: Amount = 0.0

    def select_ranks(self, ranks: NDArray[np.int64]) -> Work:
        """Keep the work of one rank in each chunk: [chunks, ranks] to [chunks].

        Args:
            ranks: [chunks] which one.
        """
        chunks = np.arange(len(ranks))
        return Work(
            **{f.name: np.asarray(getattr(self, f.name))[chunks, ranks] for f in fields(self)}
        )


def prefill_work(
    strategy: Strategy,
    shape: ModelShape,
    chunking: Chunking,
    *,
    density: float = 1.0,
    parallel_links: int = 1,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> Work:
    """Compute the work of every chunk and rank, over all layers.

    Args:
        density: share of the (query, key) pairs that attention computes, 1 if exact; without
            effect where the exchange does not let it select.
        parallel_links: other ranks from which a rank can receive at once at the full link speed:
            1 behind a switch or a network card, ranks - 1 in a full mesh.
        options: of the exchange.

    Returns:
        Arrays of [chunks, ranks].
    """
    terms = cost_terms(strategy, shape, chunking, options)
    moved = strategy.exchange.traffic(terms)
    layers = shape.attending_layers
    kept = density if strategy.selects else 1.0

    def bytes_of(stream: Stream) -> Floats:
        return _floats(stream.received, layers / min(stream.links, parallel_links))

    return Work(
        passes=np.full(chunking.tokens.shape, float(shape.num_layers)),
        linear_flops=_floats(chunking.tokens, shape.linear_flops),
        attention_flops=_head_pairs(terms) * (shape.attention_flops(1) * kept),
        exposed_bytes=bytes_of(moved.exposed),
        exposed_calls=_floats(moved.exposed.calls, layers),
        hidden_bytes=bytes_of(moved.hidden),
        hidden_calls=_floats(moved.hidden.calls, layers),
    )


def _floats(values: Ints, factor: float) -> Floats:
    # Before multiplying: FLOPs of a long prompt on one rank overflow no float.
    return values.astype(np.float64) * factor


def _head_pairs(terms: CostTerms) -> Floats:
    """[chunks, ranks] pairs times query heads: all of its tokens, or its heads of its row's."""
    row = terms.chunking.by_rows(terms.ulysses).pairs.repeat(terms.ulysses, 1)
    q_heads, _ = terms.heads_of_ranks()
    return row * q_heads
