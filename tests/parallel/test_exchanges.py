"""Every exchange of the catalogue on real gloo ranks: conformance, and bytes as published."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefill_service.parallel.exchanges.catalog import (
    EXCHANGES,
    GATHER,
    MULTI_RING,
    PASS_Q,
    RING,
    ULYSSES,
    ULYSSES_GATHER,
    USP,
)
from prefill_service.parallel.exchanges.registry import ulysses_degree
from tests.parallel.conformance import HEAD_DIM, LAYERS, Case, check_exchange, run_rank
from tests.parallel.published_bytes import published_bytes
from tests.parallel.ranks import run_ranks

EVEN = Case(tuple(60 * (i + 1) for i in range(8)), 1 << 20, 12, 2)
"""480 tokens in one chunk and 24 query heads: everything divides by 2, 3 and 4."""


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_exchange_conforms(size: int, tmp_path: Path) -> None:
    kinds = EXCHANGES if size < 5 else (MULTI_RING, GATHER)
    check_exchange(kinds, size, tmp_path)


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_receives_what_the_papers_say(size: int, tmp_path: Path) -> None:
    # What the others move depends on what is selected: see test_sparse.py.
    kinds = [kind for kind in EXCHANGES if kind.predictable]
    results = run_ranks(run_rank, size, tmp_path, [(kind, EVEN) for kind in kinds])
    for index, kind in enumerate(kinds):
        degree = ulysses_degree(kind, size, q_heads=EVEN.q_heads, kv_heads=EVEN.kv_heads)
        assert not kind.two_dimensional or degree == 2
        expected = LAYERS * published_bytes(kind, size, degree, EVEN)
        assert [result[index]["wire"] for result in results] == [expected] * size, kind


def test_chunks_move_the_past_again_only_in_rings(tmp_path: Path) -> None:
    """Ulysses, gather and both move a token once; a ring all that its ranks hold, every time."""
    ends = tuple(30 * (i + 1) for i in range(8))
    # two chunks of two patches a rank
    cases = [(kind, Case(ends, 60, 4, 1)) for kind in (GATHER, ULYSSES, RING, PASS_Q)]
    results = run_ranks(run_rank, 2, tmp_path, cases)
    gather, ulysses, ring, pass_q = (
        sum(result[i]["wire"] for result in results) // LAYERS for i in range(len(cases))
    )
    kv = 2 * 4 * HEAD_DIM * 8
    tokens = ends[-1]
    assert gather == kv * tokens
    assert ulysses == 2 * kv * tokens // 2
    assert ring == kv * (tokens // 2 + tokens)
    assert pass_q == 4 * (2 * HEAD_DIM + 1) * 8 * tokens


def test_ulysses_shares_kv_heads_where_ranks_outnumber_them(tmp_path: Path) -> None:
    """8 query heads on 2 KV heads over 4 ranks: each KV head goes to the two ranks that read it."""
    case = Case(tuple(16 * (i + 1) for i in range(4)), 1000, 2, 4)
    (results,) = zip(*run_ranks(run_rank, 4, tmp_path, [(ULYSSES, case)]), strict=True)
    one = case.tokens // 4 * HEAD_DIM * 8  # one head of one rank's tokens
    expected = LAYERS * 3 * one * (2 * 1 + 2 + 2)  # a KV head, two query heads, and back
    assert [result["wire"] for result in results] == [expected] * 4


def test_a_degree_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="degree of 3 does not divide 4 ranks"):
        ulysses_degree(USP, 4, q_heads=8, kv_heads=8, wanted=3)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 query heads"):
        ulysses_degree(ULYSSES, 4, q_heads=2, kv_heads=2)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 query heads"):
        ulysses_degree(USP, 4, q_heads=2, kv_heads=2, wanted=4)
    with pytest.raises(ValueError, match="degree of 4 exceeds the model's 2 KV heads"):
        ulysses_degree(ULYSSES_GATHER, 4, q_heads=8, kv_heads=2, wanted=4)
    for kind, heads in (
        (USP, {"q_heads": 8, "kv_heads": 1}),
        (ULYSSES_GATHER, {"q_heads": 8, "kv_heads": 8}),
    ):
        assert ulysses_degree(kind, 3, **heads) == 3
        assert ulysses_degree(kind, 6, **heads) == 3
    for kind, heads in (
        (USP, {"q_heads": 2, "kv_heads": 1}),
        (ULYSSES_GATHER, {"q_heads": 8, "kv_heads": 2}),
    ):
        assert ulysses_degree(kind, 6, **heads) == 2
        assert ulysses_degree(kind, 5, **heads) == 1
