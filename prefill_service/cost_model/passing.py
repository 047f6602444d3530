"""Whether keys should go to queries or queries to keys, when K and V are sharded.

Per rank, both move the same share (P-1)/P of their side, so the ranks drop out of the comparison
(pass-KV and pass-Q of Meta's context parallelism, arXiv 2411.01783, with the returning outputs
counted as in TokenRing, arXiv 2412.20501).
"""

from __future__ import annotations

from prefill_service.cost_model.model_shape import ModelShape


def moves_queries(shape: ModelShape, query_tokens: int, kv_tokens: int) -> bool:
    """Whether moving queries and (out, LSE) takes fewer bytes than moving K and V.

    Args:
        query_tokens: N_q, queries of the chunk, over all ranks.
        kv_tokens: N_kv, keys so far, the chunk's included.

    Returns:
        ``N_q h_q (2d + 1) < N_kv 2 h_kv d``.
    """
    return query_tokens * _query_elements(shape) < kv_tokens * _key_elements(shape)


def queries_move_from(shape: ModelShape, query_tokens: int) -> int:
    """The fewest keys from which moving ``query_tokens`` queries is cheaper than moving keys."""
    return query_tokens * _query_elements(shape) // _key_elements(shape) + 1


def _query_elements(shape: ModelShape) -> int:
    return shape.q_heads * (2 * shape.head_dim + 1)


def _key_elements(shape: ModelShape) -> int:
    return 2 * shape.kv_heads * shape.head_dim
