"""What a strategy makes a rank receive per layer and keep, and which side of attention should move.

The formulas are in each exchange's entry of the catalogue; tests compare them with the papers' and
with a walk that moves every token.
"""

from __future__ import annotations

from prefill_service.cost_model.strategies import Strategy
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import Chunking
from prefill_service.parallel.exchanges.cost_terms import CostTerms, Traffic, TrafficOptions

DEFAULT_OPTIONS = TrafficOptions()


def cost_terms(
    strategy: Strategy,
    shape: ModelShape,
    chunking: Chunking,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> CostTerms:
    """What the formulas of a strategy's exchange are made of.

    Args:
        chunking: shares of the strategy's ranks.
        options: what formulas leave open.

    Raises:
        ValueError: the chunking has other ranks than the strategy.
    """
    if chunking.ranks != strategy.ranks:
        raise ValueError(f"shares of {chunking.ranks} ranks for a strategy on {strategy.ranks}")
    return CostTerms(
        shape=shape,
        chunking=chunking,
        ulysses=strategy.ulysses,
        whole_kv_heads=strategy.whole_kv_heads,
        options=options,
    )


def traffic(
    strategy: Strategy,
    shape: ModelShape,
    chunking: Chunking,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> Traffic:
    """What a strategy moves per layer; arguments and errors of ``cost_terms``."""
    return strategy.exchange.traffic(cost_terms(strategy, shape, chunking, options))


def memory_bytes(
    strategy: Strategy,
    shape: ModelShape,
    chunking: Chunking,
    options: TrafficOptions = DEFAULT_OPTIONS,
) -> int:
    """K and V of all attending layers on the fullest rank, and one layer's exchange buffers.

    Weights, activations and the pages kept for hand-off are not in it: they depend neither on the
    exchange nor, but for the pages, on the prompt's length. Arguments and errors are those of
    ``cost_terms``.
    """
    return strategy.exchange.memory(cost_terms(strategy, shape, chunking, options))


def queries_move_from(shape: ModelShape, query_tokens: int) -> int:
    """The fewest keys from which moving ``query_tokens`` queries is cheaper than moving keys.

    Per rank, both move the same share (P-1)/P of their side where K and V are divided, so the ranks
    drop out (pass-KV and pass-Q of Meta's context parallelism, arXiv 2411.01783, with the returning
    outputs counted as in TokenRing, arXiv 2412.20501).

    Args:
        query_tokens: N_q, queries of the chunk, over all ranks.

    Returns:
        The least N_kv, the chunk's keys included, with ``N_q h_q (2d + 1) < N_kv 2 h_kv d``.
    """
    return query_tokens * _query_elements(shape) // _key_elements(shape) + 1


def _query_elements(shape: ModelShape) -> int:
    return shape.q_heads * (2 * shape.head_dim + 1)


def _key_elements(shape: ModelShape) -> int:
    return 2 * shape.kv_heads * shape.head_dim
