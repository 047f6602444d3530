"""Dealing patches: every token exactly once, in order, evenly."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.parallel.token_layout import HeldTokens, Share, deal_patches, join
from prefill_service.parallel.token_order import Order


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("patches", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("chunk_tokens", [1, 50, 10_000])
def test_every_patch_and_token_is_dealt_once_in_order(
    ranks: int, patches: int, chunk_tokens: int
) -> None:
    ends = 5 + np.arange(1, patches + 1) * 13  # five tokens of text first
    layout = deal_patches(ends, ranks, chunk_tokens)
    shares = [p for chunk in layout.shares for share in chunk for p in share.pieces]
    assert [s.first_patch for s in shares[1:]] == [s.end_patch for s in shares[:-1]]
    assert [s.start_token for s in shares[1:]] == [s.end_token for s in shares[:-1]]
    assert (shares[0].start_token, shares[-1].end_token) == (0, ends[-1])
    assert shares[-1].end_patch == patches
    for chunk in layout.shares:
        counts = [share.num_patches for share in chunk]
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)


def test_a_chunk_holds_about_the_tokens_asked_for() -> None:
    layout = deal_patches(np.arange(1, 101) * 20, ranks=2, chunk_tokens=100)
    assert len(layout.shares) == 10
    assert all(share.num_tokens == 100 for chunk in layout.shares for share in chunk)


def test_more_ranks_than_patches_leaves_some_without_work() -> None:
    layout = deal_patches([10], ranks=3, chunk_tokens=100)
    assert [s.num_tokens for s in layout.shares[0]] == [10, 0, 0]


def test_no_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one temporal patch"):
        deal_patches([], 2, 100)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("patches", [1, 5, 8, 41])
@pytest.mark.parametrize("chunk_tokens", [30, 10_000])
def test_zigzag_deals_every_token_once_and_evens_the_causal_work(
    ranks: int, patches: int, chunk_tokens: int
) -> None:
    ends = 5 + np.arange(1, patches + 1) * 13
    layout = deal_patches(ends, ranks, chunk_tokens, order=Order.ZIGZAG)
    ranges = [r for chunk in layout.shares for share in chunk for r in share.ranges]
    assert join(ranges) == [(0, ends[-1])]
    for chunk in layout.shares:
        for share in chunk:
            assert share.ranges == sorted(share.ranges)
            assert len(share.pieces) <= 2


def test_zigzag_is_even_where_one_chunk_dealt_in_runs_is_not() -> None:
    """Attended pairs over their mean, the largest of 4 ranks (db-SP's rho)."""

    def imbalance(order: Order) -> float:
        (chunk,) = deal_patches(np.arange(1, 65) * 10, 4, 10_000, order=order).shares
        pairs = [sum(b * (b + 1) - a * (a + 1) for a, b in share.ranges) for share in chunk]
        return max(pairs) / (sum(pairs) / 4)

    assert imbalance(Order.ZIGZAG) == pytest.approx(1.0, abs=1e-9)
    assert imbalance(Order.DEALT) > 1.7


def test_what_tokens_and_patches_have_travels_with_them() -> None:
    (chunk,) = deal_patches([6, 9, 12, 15], 2, 100, order=Order.ZIGZAG).shares
    first, last = chunk[0].pieces
    assert (first.first_patch, last.first_patch) == (0, 3)
    positions = np.arange(3 * 15).reshape(3, 15)
    assert chunk[0].select_tokens(positions)[0].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14]
    assert chunk[0].select_patches(np.arange(8), 2).tolist() == [0, 1, 6, 7]
    with pytest.raises(ValueError, match="2 pieces is not one range"):
        _ = chunk[0].contiguous
    assert Share(()).select_tokens(positions).shape == (3, 0)
    assert Share(()).contiguous == (0, 0)


def test_what_a_member_holds_before_a_token() -> None:
    held = HeldTokens(2)
    assert held.count(0) == held.count_before(0, 5) == 0
    held.extend(0, [(2, 4), (10, 13)])
    held.extend(0, [(13, 15), (20, 21)])
    assert held.count(0) == 8
    tokens = [*range(2, 4), *range(10, 15), 20]
    for token in range(25):
        assert held.count_before(0, token) == sum(t < token for t in tokens)
    assert held.count(1) == 0
