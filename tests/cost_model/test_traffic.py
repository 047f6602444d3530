"""What exchanges move: published formulas for even splits, walks token by token for the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from prefill_service.cost_model.chunking import Order, chunking_of, deal_tokens
from prefill_service.cost_model.model_shape import PRESETS, ModelShape
from prefill_service.cost_model.passing import moves_queries, queries_move_from
from prefill_service.cost_model.schemes import Exchange, Scheme, schemes, split_heads
from prefill_service.cost_model.traffic import Traffic, TrafficOptions, traffic
from prefill_service.cost_model.work import prefill_work
from prefill_service.parallel.head_partition import HeadSplit
from tests.cost_model.simulator import Simulation, deal, prime

SHAPE = ModelShape("test", 3, 32, 48, q_heads=8, kv_heads=4, head_dim=16, bytes_per_element=8)
ODD = ModelShape("odd", 3, 32, 48, q_heads=14, kv_heads=2, head_dim=4, bytes_per_element=2)


def moved(
    scheme: Scheme, shape: ModelShape, tokens: int, chunk: int, share: float = 1.0
) -> Traffic:
    cut = deal_tokens(tokens, scheme.ranks, chunk, scheme.order)
    return traffic(scheme, shape, cut, TrafficOptions(share))


def scheme_of(exchange: Exchange, ranks: int, ulysses: int = 1) -> Scheme:
    return Scheme(exchange, ranks, ranks if exchange is Exchange.ULYSSES else ulysses)


@pytest.mark.parametrize("p", [2, 4])
def test_one_chunk_moves_what_the_papers_say(p: int) -> None:
    n, hq, hkv, d, e = 192, 8, 4, 16, 8
    expected = {
        Exchange.GATHER: 2 * hkv * d * e * n * (p - 1) // p,
        Exchange.RING: 2 * hkv * d * e * n * (p - 1) // p,
        Exchange.MULTI_RING: 2 * hkv * d * e * n * (p - 1) // p,
        Exchange.ULYSSES: (2 * hq + 2 * hkv) * d * e * n * (p - 1) // p**2,
        Exchange.PASS_Q: hq * (2 * d + 1) * e * n * (p - 1) // p,
    }
    for exchange, size in expected.items():
        assert moved(scheme_of(exchange, p), SHAPE, n, n // p).received.tolist() == [size] * p


@pytest.mark.parametrize("exchange", [Exchange.USP, Exchange.ULYSSES_GATHER])
def test_rows_and_columns_move_what_the_paper_says(exchange: Exchange) -> None:
    n, u, r, hq, hkv, d, e = 192, 2, 2, 8, 4, 16, 8
    p = u * r
    heads = (2 * hq + 2 * hkv) * d * e * n // p * (u - 1) // u
    ring = 2 * hkv * d * e * n * (r - 1) // p
    found = moved(Scheme(exchange, p, u, exchange is not Exchange.USP), SHAPE, n, n // p)
    assert found.received.tolist() == [heads + ring] * p
    assert found.exposed.received.tolist() == [[heads] * p]


def test_the_sizes_measured_on_real_ranks() -> None:
    """4 gloo ranks, 192 tokens in float64: what a meter on the collectives counted."""
    assert moved(Scheme(Exchange.USP, 4, 2), SHAPE, 192, 48).received.max() == 122_880
    assert moved(Scheme(Exchange.RING, 4), SHAPE, 192, 48).received.max() == 147_456
    assert moved(Scheme(Exchange.PASS_Q, 4), SHAPE, 192, 48).received.max() == 304_128


def test_log_sum_exps_have_four_bytes_at_least() -> None:
    n, p, d, hq = 64, 4, 4, 14
    found = moved(Scheme(Exchange.PASS_Q, p), ODD, n, n // p)
    assert found.received.tolist() == [hq * (2 * d * 2 + 4) * n * (p - 1) // p] * p


@pytest.mark.parametrize("shape", [SHAPE, ODD], ids=["even", "uneven"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (48, 4), (61, 5), (61, 100), (130, 7)])
def test_chunks_move_what_a_walk_counts(
    shape: ModelShape, ranks: int, tokens: int, chunk: int
) -> None:
    for scheme in schemes(ranks):
        if scheme.exchange is Exchange.MULTI_RING and not prime(ranks):
            continue  # the walk's rings exist for prime numbers only
        if scheme.exchange is Exchange.ULYSSES_GATHER and scheme.ulysses > shape.kv_heads:
            continue  # never run
        walk = Simulation(str(scheme.exchange), shape, ranks, scheme.ulysses)
        share = 0.3 if scheme.exchange is Exchange.DEMAND else 1.0
        counted = walk.run(tokens, chunk, share)
        found = moved(scheme, shape, tokens, chunk, share)
        for name in ("exposed", "hidden"):
            stream = getattr(found, name)
            for values, kind in ((stream.received, name), (stream.calls, f"{name}_calls")):
                seen = [[getattr(c, kind)[rank] for rank in range(ranks)] for c in counted]
                assert values.tolist() == seen, (scheme, kind)
        cut = deal_tokens(tokens, ranks, chunk, scheme.order)
        pairs = [[c.pairs[rank] for rank in range(ranks)] for c in counted]
        work = prefill_work(scheme, shape, cut)
        assert np.allclose(work.attention_flops, np.array(pairs) * shape.attention_flops(1))


def test_sharded_keys_come_round_again_for_every_chunk() -> None:
    """gather and ulysses move each token once; ring grows with the chunks, pass_q does not."""
    once_each = (Exchange.GATHER, Exchange.ULYSSES, Exchange.PASS_Q, Exchange.ULYSSES_GATHER)
    sizes = {
        exchange: [
            int(moved(scheme_of(exchange, 4, degree), SHAPE, 1024, 256 // chunks).received.sum())
            for chunks in (1, 2, 8)
        ]
        for exchange in (*once_each, Exchange.RING)
        for degree in (2 if exchange is Exchange.ULYSSES_GATHER else 1,)
    }
    for exchange in once_each:
        assert len(set(sizes[exchange])) == 1
    once = sizes[Exchange.RING][0]
    assert sizes[Exchange.RING] == [once, once * 3 // 2, once * 9 // 2]  # (chunks + 1) / 2


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


@pytest.mark.parametrize("parts", range(1, 29))
def test_heads_are_split_evenly_and_cover_their_groups(parts: int) -> None:
    shape = PRESETS["qwen2.5-vl-7b"]
    queries, keys = split_heads(shape, parts)
    assert queries.sum() == shape.q_heads
    assert queries.max() - queries.min() <= 1
    assert keys.sum() >= max(shape.kv_heads, parts)
    assert (keys * 7 >= queries).all()


@pytest.mark.parametrize("parts", range(1, 7))
def test_whole_groups_stay_together(parts: int) -> None:
    """As ``HeadSplit`` cuts them, which ranks go by."""
    shape = PRESETS["qwen2.5-vl-7b"]
    queries, keys = split_heads(shape, parts, whole_groups=True)
    assert keys.sum() == shape.kv_heads
    assert (queries == 7 * keys).all()
    assert keys.max() - keys.min() <= 1
    split = HeadSplit(shape.q_heads, shape.kv_heads, parts, whole_groups=True)
    for part in range(parts):
        assert len(range(shape.q_heads)[split.queries(part)]) == queries[part]
        assert len(range(shape.kv_heads)[split.keys(part)]) == keys[part]


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_sparse_ulysses_moves_each_head_once(ranks: int) -> None:
    """Of even shares: every rank's heads of the others' tokens, and the others' of its own."""
    n, shape = 240, SHAPE
    scheme = scheme_of(Exchange.ULYSSES, ranks).at(density=0.3)
    found = traffic(scheme, shape, deal_tokens(n, ranks, n // ranks)).received
    own = [4 // ranks + (rank < 4 % ranks) for rank in range(ranks)]  # KV heads; 2 queries each
    size, away = shape.head_dim * shape.bytes_per_element, n - n // ranks
    assert found.tolist() == [
        size * (away * 4 * heads + n // ranks * (shape.q_heads - 2 * heads)) for heads in own
    ]
    assert scheme_of(Exchange.RING, ranks).at(density=0.3) == scheme_of(Exchange.RING, ranks)


def test_refusals_name_the_value() -> None:
    with pytest.raises(ValueError, match="29 ranks cannot share 28 query heads"):
        split_heads(PRESETS["qwen2.5-vl-7b"], 29)
    with pytest.raises(ValueError, match="tokens = 0 is not accepted"):
        deal_tokens(0, 1, 1)
    with pytest.raises(ValueError, match="shares of 2 ranks for a scheme on 3"):
        traffic(Scheme(Exchange.RING, 3), SHAPE, deal_tokens(8, 2, 4))


@pytest.mark.parametrize("shape", [SHAPE, ODD, *PRESETS.values()], ids=lambda s: s.name)
def test_queries_move_exactly_when_that_is_cheaper(shape: ModelShape) -> None:
    """Both sides of the break-even, by the rule and by the bytes of the exchanges themselves."""
    shape = replace(shape, bytes_per_element=4)  # as wide as a log-sum-exp, as in the rule
    queries = 4 * 16
    start = queries_move_from(shape, queries)
    assert moves_queries(shape, queries, start)
    assert not moves_queries(shape, queries, start - 1)
    for keys in (start // queries * queries, (start // queries + 1) * queries):
        by_keys, by_queries = (
            traffic(scheme, shape, deal_tokens(keys, 4, 16, Order.ZIGZAG))
            for scheme in (Scheme(Exchange.RING, 4), Scheme(Exchange.PASS_Q, 4))
        )
        last = [int((t.exposed.received + t.hidden.received)[-1, 0]) for t in (by_keys, by_queries)]
        assert (last[1] < last[0]) == moves_queries(shape, queries, keys)
