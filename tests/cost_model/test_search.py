"""The plan: equal to brute force on small cases, within memory, and with reasons."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace

import pytest

from prefill_service.cost_model.cost import ASSUMED, CostModel
from prefill_service.cost_model.presets import PRESETS
from prefill_service.cost_model.request import SearchRequest
from prefill_service.cost_model.search import TOLERANCE, degrees, search_candidates
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.model_shape import ModelShape
from prefill_service.parallel.exchanges.catalog import (
    DEMAND,
    EXCHANGES,
    GATHER,
    MULTI_RING,
    PASS_Q,
    RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
    ExchangeKind,
    MeshForm,
    exchange_named,
)
from tests.cost_model.simulator import Simulation, prime

SHAPE = ModelShape(
    name="test",
    num_layers=3,
    hidden=16,
    intermediate=24,
    q_heads=6,
    kv_heads=2,
    head_dim=4,
    dtype="float32",
)
CHUNKS = (2, 4, 8, 16, 64)
PLAIN = [kind for kind in EXCHANGES if kind.predictable and kind != MULTI_RING]
"""Those that differ from all others without many links, and whose bytes no selection decides."""

Found = tuple[str, int, int, int]  # exchange, ranks, Ulysses degree, tokens per chunk and rank


def degrees_of(kind: ExchangeKind, ranks: int) -> list[int]:
    match kind.mesh:
        case MeshForm.COLUMN:
            found = [1]
        case MeshForm.ROW:
            found = [ranks]
        case MeshForm.GRID:
            found = [u for u in range(2, ranks) if ranks % u == 0]
    heads = SHAPE.kv_heads if kind.whole_kv_heads else SHAPE.q_heads
    return [u for u in found if u <= heads]


def every_way(ranks: int, tokens: int) -> list[Found]:
    ways = []
    for p in range(1, ranks + 1):
        kinds = PLAIN if p > 1 else [GATHER]
        sizes = {min(size, -(-tokens // p)) for size in CHUNKS}
        ways += [
            (kind.name, p, u, size) for kind in kinds for u in degrees_of(kind, p) for size in sizes
        ]
    return ways


def walked(way: Found, tokens: int, cost: CostModel) -> tuple[float, int, int]:
    """Seconds, bytes received and memory of one way, from a walk over its tokens."""
    name, ranks, ulysses, size = way
    walk = Simulation(exchange_named(name), SHAPE, ranks, ulysses)
    attending = SHAPE.num_layers - 1
    h = SHAPE.hidden
    kv = 2 * 4
    q = 6 * 4
    full = 2 * (h * (q + 2 * kv) + q * h + 3 * h * SHAPE.intermediate)
    flops = attending * full + 2 * h * 2 * kv
    seconds = 0.0
    received = [0] * ranks
    chunks = walk.run(tokens, size)
    for chunk in chunks:
        times = []
        for rank in range(ranks):
            attention = chunk.pairs[rank] * attending * 4 * 4 * cost.per_attention_flop
            hidden = attending * (
                chunk.hidden[rank] * cost.per_byte + chunk.hidden_calls[rank] * cost.per_call
            )
            exposed = attending * (
                chunk.exposed[rank] * cost.per_byte + chunk.exposed_calls[rank] * cost.per_call
            )
            linear = chunk.tokens[rank] * flops * cost.per_linear_flop
            fixed = SHAPE.num_layers * cost.per_pass
            times.append(fixed + linear + exposed + max(attention, hidden))
            received[rank] += attending * (chunk.exposed[rank] + chunk.hidden[rank])
        seconds += max(times)
    return seconds, max(received), walk.memory(chunks, attending)


def brute_force(request: SearchRequest, cost: CostModel) -> Found | None:
    found = {}
    for way in every_way(request.max_ranks, request.tokens):
        seconds, received, memory = walked(way, request.tokens, cost)
        if memory <= request.kv_memory_bytes:
            found[way] = (seconds, received)
    if not found:
        return None
    limit = min(seconds for seconds, _ in found.values()) * (1 + TOLERANCE)
    order = [kind.name for kind in EXCHANGES]
    return min(
        (way for way, (seconds, _) in found.items() if seconds <= limit),
        key=lambda way: (
            way[1],
            way[0] != "gather",
            found[way][1],
            order.index(way[0]),
            found[way][0],
            way[2],
            way[3],
        ),
    )


def small_cases() -> list[tuple[int, int, CostModel, float]]:
    """Tokens, ranks, costs and memory, over the regimes that favour one thing or another."""
    draw = random.Random(7)
    cases = []
    for tokens, ranks in itertools.product([3, 24, 61, 150], [1, 2, 3, 4, 6]):
        for _ in range(4):
            cost = CostModel(
                per_pass=10 ** draw.uniform(-6, -3),
                per_linear_flop=10 ** draw.uniform(-10, -8),
                per_attention_flop=10 ** draw.uniform(-10, -7),
                per_byte=10 ** draw.uniform(-11, -7),
                per_call=10 ** draw.uniform(-8, -4),
                provenance="drawn",
            )
            cases.append((tokens, ranks, cost, 10 ** draw.uniform(3.2, 5)))
    return cases


def test_the_choice_equals_brute_force() -> None:
    chosen = []
    for tokens, ranks, cost, memory in small_cases():
        request = SearchRequest(
            shape=SHAPE,
            tokens=tokens,
            max_ranks=ranks,
            kv_memory_bytes=memory,
            chunk_tokens=CHUNKS,
            exchanges=PLAIN,
        )
        expected = brute_force(request, cost)
        if expected is None:
            with pytest.raises(ServiceError) as refused:
                search_candidates(request, cost)
            assert refused.value.reason is Reason.KV_POOL_FULL
            continue
        plan = search_candidates(request, cost)
        best = plan.chosen
        found = (
            str(best.strategy.exchange),
            best.strategy.ranks,
            best.strategy.ulysses,
            best.chunk_tokens,
        )
        assert found == expected, (tokens, ranks, cost, memory)
        chosen.append(found[0])
        for candidate in plan.candidates:
            strategy = candidate.strategy
            way = (str(strategy.exchange), strategy.ranks, strategy.ulysses, candidate.chunk_tokens)
            if candidate.memory_bytes:
                seconds, received, needed = walked(way, tokens, cost)
                assert candidate.seconds == pytest.approx(seconds)
                assert (candidate.bytes_received, candidate.memory_bytes) == (received, needed)
    # The cases are no test if one answer fits them all.
    assert len(set(chosen)) >= 4
    assert len(chosen) < len(small_cases())


def test_the_plan_fits_and_is_never_beaten_by_a_single_degree() -> None:
    shape = PRESETS["qwen3-vl-8b"]
    for tokens, memory in itertools.product((4096, 131_072, 1_000_000), (24, 200)):
        request = SearchRequest(shape, tokens, 8, memory * 2**30)
        plan = search_candidates(request, ASSUMED)
        assert plan.chosen.memory_bytes <= request.kv_memory_bytes
        fitting = [c for c in plan.candidates if c.rejected is None]
        assert plan.chosen in fitting
        assert plan.chosen.seconds <= min(c.seconds for c in fitting) * (1 + TOLERANCE)
        assert all(c.memory_bytes <= request.kv_memory_bytes for c in fitting)


def test_replicated_keys_need_memory_for_all_tokens() -> None:
    """On 4 ranks 1 M tokens of 8 KV heads replicated take 35 layers x 4 KiB each: 133.5 GiB."""
    shape = PRESETS["qwen3-vl-8b"]
    roomy = SearchRequest(shape, 1_000_000, 4, 134 * 2**30, exchanges=[GATHER])
    assert search_candidates(roomy, ASSUMED).chosen.memory_bytes == 1_000_000 * 35 * 4096
    with pytest.raises(ServiceError) as refused:
        search_candidates(replace(roomy, kv_memory_bytes=133 * 2**30), ASSUMED)
    assert refused.value.reason is Reason.KV_POOL_FULL
    assert "1,000,000 tokens of Qwen3-VL-8B on up to 4 ranks do not fit" in str(refused.value)
    assert "133.5 GiB per rank (gather on 1" in str(refused.value)
    assert "the limit is 133.0 GiB" in str(refused.value)
    tight = replace(roomy, kv_memory_bytes=133 * 2**30, exchanges=EXCHANGES)
    assert search_candidates(tight, ASSUMED).chosen.strategy.exchange != GATHER
    gathers = [
        candidate.rejected or ""
        for candidate in search_candidates(tight, ASSUMED).candidates
        if candidate.strategy.exchange == GATHER
    ]
    assert gathers
    assert all(re.search("K/V of 133.5 GiB per rank exceeds 133.0 GiB", text) for text in gathers)


def test_regimes_have_their_exchange() -> None:
    shape = PRESETS["qwen3-vl-8b"]
    slow = replace(ASSUMED, per_byte=1 / 1e9)

    def best(cost: CostModel = ASSUMED, **changes: object) -> str:
        request = SearchRequest(shape, 400_000, 8, 100 * 2**30)
        return str(search_candidates(replace(request, **changes), cost).chosen.strategy.exchange)  # type: ignore[arg-type]

    # Few keys selected: only gather has all of them at hand.
    assert best(density=0.1) == "gather"
    # On a slow link what moves least in small chunks wins.
    sharded = (RING, PASS_Q)
    assert best(slow, exchanges=sharded, chunk_tokens=[512]) == "pass_q"
    assert best(slow, exchanges=sharded, chunk_tokens=[50_000]) == "ring"
    # Where linear layers are all that takes time, the simplest is taken, not what moves least.
    linear = replace(ASSUMED, per_attention_flop=0.0, per_byte=0.0, per_call=0.0)
    assert best(linear) == "gather"
    # Of the others, which are equal too, it is what moves least.
    others = (RING, ULYSSES, USP, PASS_Q, ULYSSES_GATHER)
    assert best(linear, exchanges=others) == "ulysses"
    # Seven links at once make seven rings of one.
    rings = (RING, MULTI_RING)
    assert best(slow, exchanges=rings, parallel_links=7) == "multi_ring"
    assert best(slow, exchanges=rings) == "ring"


@pytest.mark.parametrize("ranks", [4, 6, 10])
def test_no_disjoint_rings_means_a_ring(ranks: int) -> None:
    assert not prime(ranks)
    request = SearchRequest(PRESETS["qwen3-vl-8b"], 100_000, ranks, 2**40, parallel_links=9)
    rejected = [
        candidate.rejected
        for candidate in search_candidates(request, ASSUMED).candidates
        if candidate.strategy.exchange == MULTI_RING and candidate.strategy.ranks == ranks
    ]
    assert len(rejected) == 1
    assert rejected[0]
    assert f"for {ranks} ranks" in rejected[0]
    assert ("none exist" in rejected[0]) == (ranks in (4, 6))


def test_what_cannot_run_says_why() -> None:
    shape = replace(SHAPE, q_heads=2, kv_heads=1)
    plan = search_candidates(SearchRequest(shape, 100, 3, 2**30), ASSUMED)
    reasons = {(c.strategy.label, c.strategy.ranks): c.rejected for c in plan.candidates}
    assert reasons["ulysses", 3] == "3 ranks cannot share 2 query heads"
    assert "density 1" in (reasons["demand", 2] or "")
    with pytest.raises(ServiceError, match=r"no exchange can run 100 tokens .* demand: density 1"):
        search_candidates(
            SearchRequest(shape, 100, 3, 2**30, exchanges=[DEMAND]), ASSUMED
        )  # fmt: skip


def test_the_reason_names_what_decided() -> None:
    shape = PRESETS["qwen2.5-vl-7b"]
    plan = search_candidates(SearchRequest(shape, 1_000_000, 4, 20 * 2**30), ASSUMED)
    best = plan.chosen.strategy
    assert plan.reason.startswith(f"{best.label} on {best.ranks} ranks")
    for part in ("candidates that fit", "Of other exchanges", "A rank receives", "of 20.0 GiB"):
        assert part in plan.reason
    alone = search_candidates(SearchRequest(shape, 1000, 1, 20 * 2**30), ASSUMED)
    assert "Nothing is exchanged." in alone.reason


def test_many_ranks_are_planned_over_divisors_and_powers_of_two() -> None:
    assert degrees(6) == [1, 2, 3, 4, 5, 6]
    assert degrees(24) == [1, 2, 3, 4, 6, 8, 12, 16, 24]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens = 0 is not accepted; expected 1 or more"),
        ({"max_ranks": 0}, "max_ranks = 0"),
        ({"parallel_links": 0}, "parallel_links = 0"),
        ({"kv_memory_bytes": 0}, "kv_memory_bytes = 0 .* more than 0"),
        ({"density": 0.0}, "density = 0.0 .* 0 < density <= 1"),
        ({"density": float("nan")}, "density = nan"),
        ({"demand_share": 1.5}, "demand_share = 1.5 .* 0 to 1"),
        ({"chunk_tokens": (0,)}, "chunk_tokens = 0"),
        ({"chunk_tokens": ()}, "chunk_tokens = \\(\\) .* at least one"),
        ({"exchanges": ()}, "exchanges = \\(\\)"),
    ],
)
def test_requests_are_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SearchRequest(SHAPE, 10, 2, 2**30), **changes)  # type: ignore[arg-type]
