"""Dealing patches: every token exactly once, in order, evenly."""

from __future__ import annotations

import numpy as np
import pytest

from prefill_service.parallel.layout import deal_patches


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("patches", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("chunk_tokens", [1, 50, 10_000])
def test_every_patch_and_token_is_dealt_once_in_order(
    ranks: int, patches: int, chunk_tokens: int
) -> None:
    ends = 5 + np.arange(1, patches + 1) * 13  # five tokens of text first
    layout = deal_patches(ends, ranks, chunk_tokens)
    shares = [share for chunk in layout.shares for share in chunk]
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
