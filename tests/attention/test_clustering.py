"""Clustered order: a permutation that puts like keys together."""

from __future__ import annotations

import pytest
import torch

from prefill_service.attention.sparse.clustering import cluster_order, order_segments
from tests.attention.oracle import rand


def spread(keys: torch.Tensor, block: int) -> float:
    """Mean variance within blocks."""
    return keys.reshape(-1, block, keys.shape[-1]).var(1, unbiased=False).mean().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("segment", "block"), [(64, 64), (128, 64), (1024, 64), (512, 128)])
def test_it_is_a_permutation(segment: int, block: int, dtype: torch.dtype) -> None:
    order = cluster_order(rand(2, 3, segment, 16, dtype=dtype), block)
    assert order.shape == (2, 3, segment)
    assert torch.equal(order.sort(-1).values, torch.arange(segment).expand(2, 3, -1))


@pytest.mark.parametrize("fixed", [0, 64, 128, 192, 512])
@pytest.mark.parametrize("segments", [1, 3])
def test_segments_are_ordered_each_by_itself_around_what_is_fixed(
    segments: int, fixed: int
) -> None:
    keys = rand(2, segments * 512, 16)
    order = order_segments(keys, 64, 512, fixed)
    own = order.view(2, segments, 512)
    sorted_order = own.sort(-1).values.flatten(1)
    assert torch.equal(sorted_order, torch.arange(segments * 512).expand(2, -1))
    assert torch.equal(order[:, :fixed], torch.arange(fixed).expand(2, -1))
    start = 0 if not fixed else 512
    for segment in range(start, segments * 512, 512):
        alone = cluster_order(keys[:, segment : segment + 512], 64) + segment
        assert torch.equal(order[:, segment : segment + 512], alone)
    if fixed <= 128:  # the rest of the first segment is clustered too
        assert (order[:, fixed:512] != torch.arange(fixed, 512)).double().mean() > 0.5


def test_interleaved_kinds_are_separated() -> None:
    # 16 kinds of key in raster order, as the positions of a frame are: no block is pure.
    kinds = rand(16, 32, seed=1) * 3
    keys = kinds.repeat(64, 1) + 0.1 * rand(1024, 32)
    order = cluster_order(keys, 64)
    assert spread(keys, 64) > 5
    assert spread(keys[order], 64) < 0.1
    labels = (torch.arange(1024) % 16)[order].reshape(16, 64)
    assert all(len(row.unique()) == 1 for row in labels)


def test_diffuse_keys_still_gain() -> None:
    keys = rand(1024, 32)
    assert spread(keys[cluster_order(keys, 64)], 64) < 0.95 * spread(keys, 64)


def test_an_outlier_ends_up_at_the_end_of_the_order() -> None:
    keys = 0.1 * rand(512, 16)
    keys[137] += 10
    order = cluster_order(keys, 64).tolist()
    assert order.index(137) in (0, 511)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_a_permutation(bad: float) -> None:
    keys = rand(256, 8)
    keys[5, 3] = bad
    order = cluster_order(keys, 64)
    assert torch.equal(order.sort().values, torch.arange(256))


@pytest.mark.parametrize(("segment", "block"), [(100, 64), (192, 64), (32, 64)])
def test_segments_are_power_of_two_blocks(segment: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"segment of {segment} tokens .* block of {block}"):
        cluster_order(rand(segment, 8), block)
