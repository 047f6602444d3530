"""What exchanges move: published formulas for even splits, walks token by token for the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prefill_service.cost_model.presets import PRESETS
from prefill_service.cost_model.strategies import Strategy, strategies
from prefill_service.cost_model.traffic import memory_bytes, queries_move_from, traffic
from prefill_service.cost_model.work import prefill_work
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.chunking import chunking_of, deal_tokens
from prefill_service.parallel.exchanges.catalog import (
    DEMAND,
    GATHER,
    MULTI_RING,
    PASS_Q,
    RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
    ExchangeKind,
    MeshForm,
)
from prefill_service.parallel.exchanges.cost_terms import Traffic, TrafficOptions
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.token_order import Order
from tests.cost_model.simulator import Simulation, deal, prime

SHAPE = ModelShape(
    name="test",
    num_layers=3,
    hidden=32,
    intermediate=48,
    q_heads=8,
    kv_heads=4,
    head_dim=16,
    dtype="float64",
)
ODD = replace(SHAPE, name="odd", q_heads=14, kv_heads=2, head_dim=4, dtype="bfloat16")


def moved(
    strategy: Strategy, shape: ModelShape, tokens: int, chunk: int, *, share: float = 1.0
) -> Traffic:
    cut = deal_tokens(tokens, strategy.ranks, chunk, strategy.order)
    return traffic(strategy, shape, cut, TrafficOptions(share))


def scheme_of(exchange: ExchangeKind, ranks: int, ulysses: int = 1) -> Strategy:
    return Strategy(exchange, ranks, ranks if exchange.mesh is MeshForm.ROW else ulysses)


@pytest.mark.parametrize("p", [2, 4])
def test_one_chunk_moves_what_the_papers_say(p: int) -> None:
    n = 192
    hq = 8
    hkv = 4
    d = 16
    e = 8
    expected = {
        GATHER: 2 * hkv * d * e * n * (p - 1) // p,
        RING: 2 * hkv * d * e * n * (p - 1) // p,
        MULTI_RING: 2 * hkv * d * e * n * (p - 1) // p,
        ULYSSES: (2 * hq + 2 * hkv) * d * e * n * (p - 1) // p**2,
        PASS_Q: hq * (2 * d + 1) * e * n * (p - 1) // p,
    }
    for exchange, size in expected.items():
        assert moved(scheme_of(exchange, p), SHAPE, n, n // p).received.tolist() == [size] * p


@pytest.mark.parametrize("exchange", [USP, ULYSSES_GATHER])
def test_rows_and_columns_move_what_the_paper_says(exchange: ExchangeKind) -> None:
    n = 192
    u = 2
    r = 2
    hq = 8
    hkv = 4
    d = 16
    e = 8
    p = u * r
    heads = (2 * hq + 2 * hkv) * d * e * n // p * (u - 1) // u
    ring = 2 * hkv * d * e * n * (r - 1) // p
    found = moved(Strategy(exchange, p, u), SHAPE, n, n // p)
    assert found.received.tolist() == [heads + ring] * p
    assert found.exposed.received.tolist() == [[heads] * p]


def test_the_sizes_measured_on_real_ranks() -> None:
    """4 gloo ranks, 192 tokens in float64: what counting the collectives found."""
    assert moved(Strategy(USP, 4, 2), SHAPE, 192, 48).received.max() == 122_880
    assert moved(Strategy(RING, 4), SHAPE, 192, 48).received.max() == 147_456
    assert moved(Strategy(PASS_Q, 4), SHAPE, 192, 48).received.max() == 304_128


def test_log_sum_exps_have_four_bytes_at_least() -> None:
    n = 64
    p = 4
    d = 4
    hq = 14
    found = moved(Strategy(PASS_Q, p), ODD, n, n // p)
    assert found.received.tolist() == [hq * (2 * d * 2 + 4) * n * (p - 1) // p] * p


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "uneven"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (48, 4), (61, 5), (61, 100), (130, 7)])
def test_chunks_move_what_a_walk_counts(
    shape: ModelShape, ranks: int, tokens: int, chunk: int
) -> None:
    for strategy in strategies(ranks):
        if strategy.exchange == MULTI_RING and not prime(ranks):
            continue  # the walk's rings exist for prime numbers only
        if strategy.exchange.whole_kv_heads and strategy.ulysses > shape.kv_heads:
            continue  # never run
        share = 1.0 if strategy.exchange.predictable else 0.3
        walk = Simulation(strategy.exchange, shape, ranks, strategy.ulysses, share=share)
        counted = walk.run(tokens, chunk)
        found = moved(strategy, shape, tokens, chunk, share=share)
        for name in ("exposed", "hidden"):
            stream = getattr(found, name)
            for values, kind in ((stream.received, name), (stream.calls, f"{name}_calls")):
                seen = [[getattr(c, kind)[rank] for rank in range(ranks)] for c in counted]
                assert values.tolist() == seen, (strategy, kind)
        cut = deal_tokens(tokens, ranks, chunk, strategy.order)
        pairs = [[c.pairs[rank] for rank in range(ranks)] for c in counted]
        work = prefill_work(strategy, shape, cut)
        assert np.allclose(work.attention_flops, np.array(pairs) * shape.attention_flops(1))


def test_sharded_keys_come_round_again_for_every_chunk() -> None:
    """gather and ulysses move each token once; ring grows with the chunks, pass_q does not."""
    once_each = (GATHER, ULYSSES, PASS_Q, ULYSSES_GATHER)
    sizes = {
        exchange: [
            int(moved(scheme_of(exchange, 4, degree), SHAPE, 1024, 256 // chunks).received.sum())
            for chunks in (1, 2, 8)
        ]
        for exchange in (*once_each, RING)
        for degree in (2 if exchange == ULYSSES_GATHER else 1,)
    }
    for exchange in once_each:
        assert len(set(sizes[exchange])) == 1
    once = sizes[RING][0]
    assert sizes[RING] == [once, once * 3 // 2, once * 9 // 2]  # (chunks + 1) / 2


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_dealt_tokens_equal_a_real_layout(order: Order, ranks: int) -> None:
    cut = deal_tokens(101, ranks, 9, order)
    shares = deal(101, ranks, 9, order is Order.ZIGZAG)
    ranges = [[[(t, t + 1) for t in share] for share in chunk] for chunk in shares]
    real = chunking_of(ranges)
    assert cut.tokens.tolist() == real.tokens.tolist()
    assert cut.pairs.tolist() == real.pairs.tolist()
    assert cut.pairs.sum() == 101 * 102 / 2


def test_zigzag_balances_one_chunk_and_dealing_does_not() -> None:
    zigzag = deal_tokens(4096, 4, 1024, Order.ZIGZAG).pairs
    dealt = deal_tokens(4096, 4, 1024, Order.DEALT).pairs
    assert zigzag.max() == zigzag.min()
    assert dealt.max() > 6 * dealt.min()


def head_counts(split: HeadSplit) -> tuple[np.ndarray, np.ndarray]:
    """[parts] query heads and KV heads."""
    queries, keys = (
        np.array([part.stop - part.start for part in map(of, range(split.parts))])
        for of in (split.queries, split.keys)
    )
    return queries, keys


@pytest.mark.parametrize("parts", range(1, 29))
def test_heads_are_split_evenly_and_cover_their_groups(parts: int) -> None:
    shape = PRESETS["qwen2.5-vl-7b"]
    queries, keys = head_counts(HeadSplit(shape.q_heads, shape.kv_heads, parts))
    assert queries.sum() == shape.q_heads
    assert queries.max() - queries.min() <= 1
    assert keys.sum() >= max(shape.kv_heads, parts)
    assert (keys * 7 >= queries).all()


@pytest.mark.parametrize("parts", range(1, 7))
def test_whole_kv_heads_stay_together(parts: int) -> None:
    shape = PRESETS["qwen2.5-vl-7b"]
    split = HeadSplit(shape.q_heads, shape.kv_heads, parts, whole_kv_heads=True)
    queries, keys = head_counts(split)
    assert keys.sum() == shape.kv_heads
    assert (queries == 7 * keys).all()
    assert keys.max() - keys.min() <= 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_sparse_ulysses_moves_each_head_once(ranks: int) -> None:
    """Of even shares: every rank's heads of the others' tokens, and the others' of its own."""
    n = 240
    shape = SHAPE
    strategy = scheme_of(ULYSSES, ranks).with_density(density=0.3)
    found = traffic(strategy, shape, deal_tokens(n, ranks, n // ranks)).received
    own = [4 // ranks + (rank < 4 % ranks) for rank in range(ranks)]  # KV heads; 2 queries each
    size = shape.head_dim * shape.bytes_per_element
    away = n - n // ranks
    assert found.tolist() == [
        size * (away * 4 * heads + n // ranks * (shape.q_heads - 2 * heads)) for heads in own
    ]
    assert scheme_of(RING, ranks).with_density(density=0.3) == scheme_of(RING, ranks)


@pytest.mark.parametrize("block", [64, 128])
def test_demand_sends_and_keeps_a_summary_for_each_block(block: int) -> None:
    """With no key selected elsewhere, summaries are all that moves: 4 vectors and a number."""
    ranks = 4
    strategy = scheme_of(DEMAND, ranks).with_density(density=0.3)
    cut = deal_tokens(8192, ranks, 1024)  # in two chunks
    options = TrafficOptions(0.0, block)
    summaries = 8192 // block * SHAPE.kv_heads * (4 * SHAPE.head_dim + 1) * 8
    received = traffic(strategy, SHAPE, cut, options).received
    assert received.tolist() == [summaries * (ranks - 1) // ranks] * ranks
    kept = SHAPE.attending_layers * (2048 * SHAPE.row_bytes + summaries)
    arriving = summaries * (ranks - 1) // ranks // 2  # of a chunk
    assert memory_bytes(strategy, SHAPE, cut, options) == kept + arriving


def test_refusals_name_the_value() -> None:
    with pytest.raises(ValueError, match="degree of 29 exceeds the model's 28 query heads"):
        HeadSplit(28, 4, 29)
    with pytest.raises(ValueError, match="tokens = 0 is not accepted"):
        deal_tokens(0, 1, 1)
    with pytest.raises(ValueError, match="shares of 2 ranks for a strategy on 3"):
        traffic(Strategy(RING, 3), SHAPE, deal_tokens(8, 2, 4))


@pytest.mark.parametrize("shape", [SHAPE, ODD, *PRESETS.values()], ids=lambda s: s.name)
def test_queries_move_exactly_when_that_is_cheaper(shape: ModelShape) -> None:
    """Both sides of the break-even, by the rule and by the bytes of the exchanges themselves."""
    shape = replace(shape, dtype="float32")  # as wide as a log-sum-exp, as in the rule
    queries = 4 * 16
    start = queries_move_from(shape, queries)
    query_elements = queries * shape.q_heads * (2 * shape.head_dim + 1)
    key_elements = 2 * shape.kv_heads * shape.head_dim
    assert query_elements < start * key_elements
    assert query_elements >= (start - 1) * key_elements
    for keys in (start // queries * queries, (start // queries + 1) * queries):
        by_keys, by_queries = (
            traffic(strategy, shape, deal_tokens(keys, 4, 16, Order.ZIGZAG))
            for strategy in (Strategy(RING, 4), Strategy(PASS_Q, 4))
        )
        last = [int((t.exposed.received + t.hidden.received)[-1, 0]) for t in (by_keys, by_queries)]
        assert (last[1] < last[0]) == (keys >= start)
