"""Block summaries, and the two functions of the score variance against what they approximate."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_service.attention.sparse.summaries import (
    BlockSummaries,
    empty_summaries,
    lift,
    misplaced_share,
    summarize,
)
from tests.attention.oracle import log_mean_exp, rand


def test_against_the_definition() -> None:
    k = rand(2, 192, 8)
    v = rand(2, 192, 8, seed=1)
    known = summarize(k, v, 64)
    for head in range(2):
        for block in range(3):
            keys = k[head, block * 64 : (block + 1) * 64]
            torch.testing.assert_close(known.k_mean[head, block], keys.mean(0))
            torch.testing.assert_close(known.k_var[head, block], keys.var(0, unbiased=False))
            values = v[head, block * 64 : (block + 1) * 64]
            torch.testing.assert_close(known.v_mean[head, block], values.mean(0))
            away = keys - keys.mean(0)
            farthest = away[away.norm(dim=1).argmax()]
            outliers = keys[away @ farthest > 0.5 * farthest @ farthest]
            torch.testing.assert_close(known.k_far[head, block], outliers.mean(0))
            assert known.far_count[head, block] == len(outliers)


def test_an_object_of_several_keys_is_one_outlier() -> None:
    """Nine keys that are alike among others: their mean, and how many they are."""
    k = 0.1 * rand(1, 64, 8)
    k[0, 20:29] += 3
    known = summarize(k, k, 64)
    assert known.far_count == 9
    torch.testing.assert_close(known.k_far[0, 0], k[0, 20:29].mean(0))


def test_of_equal_keys_none_is_far() -> None:
    known = summarize(torch.ones(1, 64, 8), torch.ones(1, 64, 8), 64)
    assert known.far_count == 1
    assert (known.k_far == 1).all()


def test_half_precision_is_summarised_in_float32() -> None:
    k = rand(1, 64, 8, dtype=torch.bfloat16) + 100
    known = summarize(k, k, 64)
    assert known.k_var.dtype == torch.float32
    torch.testing.assert_close(known.k_var[0, 0], k[0].float().var(0, unbiased=False))


def test_parts_of_a_store() -> None:
    store = empty_summaries((2, 6, 8), torch.float32, torch.device("cpu"))
    part = summarize(rand(2, 128, 8).float(), rand(2, 128, 8, seed=1).float(), 64)
    store.put(3, part)
    assert torch.equal(store.first(5).k_far[:, 3:], part.k_far)
    sent = BlockSummaries.unpack(part.pack())
    assert all(map(torch.equal, sent.parts, part.parts))
    assert torch.equal(store.of_heads(torch.tensor([1])).v_mean[0, 3:5], part.v_mean[1])
    assert not store.k_mean[:, 5:].any()


def test_an_incomplete_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"100 tokens .* blocks of 64"):
        summarize(rand(1, 100, 8), rand(1, 100, 8), 64)


@pytest.mark.parametrize("deviation", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_lift_is_the_log_mean_exp_of_normal_scores(deviation: float) -> None:
    # The median of many blocks: the mean of exp is ruled by blocks that are never met.
    scores = rand(4000, 64) * deviation
    expected = log_mean_exp(scores).median().item()
    got = lift(torch.tensor(deviation**2, dtype=torch.float64), 64).item()
    assert got == pytest.approx(expected, abs=0.02 + 0.2 * deviation)
    assert got <= deviation * math.sqrt(2 * math.log(64))  # no block exceeds its best key


@pytest.mark.parametrize("deviation", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_misplaced_share_is_the_distance_to_uniform(deviation: float) -> None:
    p = (rand(4000, 4096) * deviation).softmax(-1)
    distance = (p - 1 / 4096).clamp(min=0).sum(-1).mean().item()
    got = misplaced_share(torch.tensor(deviation**2, dtype=torch.float64)).item()
    assert got == pytest.approx(math.erf(deviation / math.sqrt(8)), abs=0.007)
    if deviation <= 2:  # beyond, 4096 samples miss the tail that carries the mass
        assert got == pytest.approx(distance, abs=0.02)
