"""From which length on sparse attention pays on this machine: measured, not assumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from prefill_service.attention.dense import attend_causal
from prefill_service.attention.report import NEVER
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.backends import make_backend
from prefill_service.attention.sparse.clustering import cluster_order
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.summaries import summarize
from prefill_service.attention_shape import AttentionShape

logger = logging.getLogger(__name__)

_LENGTHS = tuple(1 << power for power in range(10, 18))
_KEPT_EVERY = 4  # every fourth block is kept: what balanced keeps of a hard input
_GAIN = 0.9  # sparse has to win by more than the noise
_BUDGET_S = 3.0
_ROUNDS = 3


def measure_crossover(
    shape: AttentionShape, settings: SparseSettings, chunk_tokens: int, device: torch.device
) -> int:
    """The shortest of a few lengths at which a sparse chunk beats a dense one.

    One chunk of queries at the end of 1 K, 2 K, ... keys, a quarter of the blocks kept, ordering
    and summaries of a chunk's keys included. Stops at the first win, or after some seconds, not
    counting the warm-up, in which kernels are compiled. On CPUs it is the process's own time that
    counts: other ranks, and a vLLM that starts, use the same cores.

    Returns:
        Tokens; the next length if time ran out, ``NEVER`` if the longest one was no win.
    """
    dtype = shape.torch_dtype
    spent_s = 0.0
    for keys in _LENGTHS:
        if spent_s > _BUDGET_S:
            return keys
        queries = min(chunk_tokens, keys // 2)
        q = torch.randn(shape.q_heads, queries, shape.head_dim, dtype=dtype, device=device)
        k, v = torch.randn(2, shape.kv_heads, keys, shape.head_dim, dtype=dtype, device=device)
        dense_s, sparse_s = _fastest(
            device,
            partial(attend_causal, q, k, v, q_offset=keys - queries, scale=1.0),
            sparse_chunk(q, k, v, settings),
        )
        logger.debug("%d keys: dense %.2g s, sparse %.2g s", keys, dense_s, sparse_s)
        spent_s += _ROUNDS * (dense_s + sparse_s)
        if sparse_s < _GAIN * dense_s:
            return keys
    return NEVER


def sparse_chunk(
    q: Tensor, k: Tensor, v: Tensor, settings: SparseSettings
) -> Callable[[], SparseResult]:
    """What a chunk of queries at the end of the keys takes when it is sparse, to be timed.

    Order as many keys as there are queries, summarise them, select every fourth block, attend.
    """
    block = settings.block_tokens
    tiles = settings.tiles(k.shape[1] - q.shape[1], q.shape[1])
    past = slice(0, tiles.blocks * block)
    kept = (torch.arange(tiles.blocks) % _KEPT_EVERY == 0).to(q.device)
    unlimited = torch.full((len(k),), torch.inf, device=q.device)  # no other block is kept
    problem = SparseProblem(
        q=q,
        k=k,
        v=v,
        heads=torch.arange(len(k), device=q.device),
        summaries=summarize(k[:, past], v[:, past], block),
        tiles=tiles,
        epsilon=unlimited,
        row_limit=unlimited,
        forced=kept & ~tiles.hidden(q.device),
        scale=1.0,
    )
    backend = make_backend(q.device)
    segments = -(-tiles.queries // settings.segment_tokens)
    unordered = k[:, : segments * settings.segment_tokens]
    unordered = unordered.reshape(len(k), segments, -1, k.shape[-1])
    fresh = slice(0, tiles.queries // block * block)

    def run() -> SparseResult:
        cluster_order(unordered, block)
        summarize(k[:, fresh], v[:, fresh], block)
        return backend.attend_sparse(problem, NoHooks())

    return run


def _fastest(device: torch.device, *contestants: Callable[[], object]) -> list[float]:
    """Best of some runs of each, taking turns, after one to warm up."""
    best = [float("inf")] * len(contestants)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for number in range(1 + _ROUNDS):
        for i, run in enumerate(contestants):
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                best[i] = min(best[i], clock() - start)
    return best
