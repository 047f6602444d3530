"""Which exchange, on how many ranks, in which chunks: all costed, the best one chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefill_service.cost_model.cost import CostModel
from prefill_service.cost_model.explain import explain
from prefill_service.cost_model.number_format import gibibytes
from prefill_service.cost_model.request import Candidate, SearchRequest, SearchResult
from prefill_service.cost_model.strategies import Strategy, strategies
from prefill_service.cost_model.traffic import memory_bytes, traffic
from prefill_service.cost_model.work import prefill_work
from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.chunking import Chunking, deal_tokens
from prefill_service.parallel.exchanges.catalog import EXCHANGES
from prefill_service.parallel.token_order import Order

TOLERANCE = 0.02
"""Relative difference that the model's own error makes meaningless."""

_ALL_DEGREES_UP_TO = 16


def search_candidates(request: SearchRequest, cost: CostModel) -> SearchResult:
    """Choose the fastest way that fits the memory.

    Those within ``TOLERANCE`` of the fastest are equal as far as the model can tell. Of them, the
    one on the fewest ranks is taken, ``gather``, the simplest exchange, before others, and of these
    the one that moves the fewest bytes, which depends least on how well transfers are hidden.

    Raises:
        ServiceError: KV_POOL_FULL, naming the least memory that would do and what there is.
    """
    candidates = list(_candidates(request, cost))
    fitting = [candidate for candidate in candidates if candidate.rejected is None]
    if not fitting:
        raise _nothing_fits(request, candidates)
    chosen = choose(fitting)
    ordered = sorted(candidates, key=lambda c: (c.rejected is not None, c.seconds))
    return SearchResult(
        chosen=chosen, reason=explain(request, chosen, fitting), candidates=tuple(ordered)
    )


def choose(fitting: Sequence[Candidate]) -> Candidate:
    """The best of candidates that can all be chosen."""
    limit = min(candidate.seconds for candidate in fitting) * (1 + TOLERANCE)
    order = {exchange: place for place, exchange in enumerate(EXCHANGES)}

    def preference(candidate: Candidate) -> tuple[float, ...]:
        """Ascending, the best one first."""
        strategy = candidate.strategy
        place = order.get(strategy.exchange, len(order))
        return (
            strategy.ranks,
            place > 0,
            candidate.bytes_received,
            place,
            candidate.seconds,
            strategy.ulysses,
            candidate.chunk_tokens,
        )

    return min((one for one in fitting if one.seconds <= limit), key=preference)


def degrees(max_ranks: int) -> list[int]:
    """Ranks to consider: all, or of many those that divide them and the powers of two."""
    every = range(1, max_ranks + 1)
    if max_ranks <= _ALL_DEGREES_UP_TO:
        return list(every)
    return [ranks for ranks in every if max_ranks % ranks == 0 or ranks & (ranks - 1) == 0]


def _candidates(request: SearchRequest, cost: CostModel) -> Iterator[Candidate]:
    for ranks in degrees(request.max_ranks):
        if ranks < request.min_ranks:
            continue
        share = -(-request.tokens // ranks)
        sizes = sorted({min(size, share) for size in request.chunk_tokens})
        cuts = {
            (size, order): deal_tokens(request.tokens, ranks, size, order)
            for size in sizes
            for order in Order
        }
        for exact in strategies(ranks, request.exchanges):
            strategy = exact.with_density(request.density)
            unsuitable = strategy.unsuitable(request.shape, request.density, request.parallel_links)
            if unsuitable:
                yield Candidate(strategy, sizes[-1], rejected=unsuitable)
                continue
            for size in sizes:
                yield _evaluate(
                    request, cost, strategy, chunk_tokens=size, chunking=cuts[size, strategy.order]
                )


def _evaluate(
    request: SearchRequest,
    cost: CostModel,
    strategy: Strategy,
    *,
    chunk_tokens: int,
    chunking: Chunking,
) -> Candidate:
    shape = request.shape
    options = request.options(chunk_tokens)
    work = prefill_work(
        strategy,
        shape,
        chunking,
        density=request.density,
        parallel_links=request.parallel_links,
        options=options,
    )
    slowest = cost.slowest_ranks(work)
    seconds = float(cost.chunk_seconds(slowest).sum())
    computing = float(np.sum(cost.compute(slowest) + cost.attention(slowest)))
    transfer = float(np.sum(cost.exposed(slowest) + cost.hidden(slowest)))
    received = traffic(strategy, shape, chunking, options).received.max()
    memory = memory_bytes(strategy, shape, chunking, options)
    rejected = None
    if memory > request.kv_memory_bytes:
        rejected = (
            f"K/V of {gibibytes(memory)} per rank exceeds {gibibytes(request.kv_memory_bytes)}"
        )
    return Candidate(
        strategy=strategy,
        chunk_tokens=chunk_tokens,
        seconds=seconds,
        transfer_seconds=transfer,
        exposed_seconds=max(0.0, seconds - computing),
        bytes_received=shape.attending_layers * int(received),
        memory_bytes=memory,
        rejected=rejected,
    )


def _nothing_fits(request: SearchRequest, candidates: Sequence[Candidate]) -> ServiceError:
    able = [candidate for candidate in candidates if candidate.memory_bytes]
    where = f"{request.tokens:,} tokens of {request.shape.name} on up to {request.max_ranks} ranks"
    if not able:
        reasons = "; ".join(sorted({f"{c.strategy.label}: {c.rejected}" for c in candidates}))
        return ServiceError(Reason.INVALID_REQUEST, f"no exchange can run {where}: {reasons}")
    least = min(able, key=lambda candidate: candidate.memory_bytes)
    return ServiceError(
        Reason.KV_POOL_FULL,
        f"{where} do not fit: the least that K/V take is {gibibytes(least.memory_bytes)} per rank "
        f"({least.strategy.label} on {least.strategy.ranks}, "
        f"{least.chunk_tokens:,} tokens per chunk and rank), "
        f"the limit is {gibibytes(request.kv_memory_bytes)}",
        needed_bytes=least.memory_bytes,
        limit_bytes=int(request.kv_memory_bytes),
    )
