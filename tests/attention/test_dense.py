"""Partial attention and its merge against a float64 softmax."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, attend, empty_partial, hide_broken, merge

SCALE = 0.3


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Partial:
    """Softmax in float64; mask [queries, keys], True where a query sees a key."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    scores = (q.double() @ k.mT * SCALE).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return Partial(weights @ v, lse)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (7, 1), (8, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 37), (130, 129), (3, 1000)])
def test_all_keys(heads: tuple[int, int], queries: int, keys: int) -> None:
    q = rand(heads[0], queries, 16)
    k = rand(heads[1], keys, 16, seed=1)
    v = rand(heads[1], keys, 16, seed=2)
    expected = oracle(q, k, v, torch.ones(queries, keys, dtype=torch.bool))
    result = attend(q, k, v, causal=False, scale=SCALE)
    torch.testing.assert_close(result.out, expected.out, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.lse, expected.lse, rtol=0, atol=1e-5)  # kernel's LSE is fp32


@pytest.mark.parametrize("length", [1, 2, 63, 200])
def test_causal(length: int) -> None:
    q = rand(6, length, 32)
    k = rand(2, length, 32, seed=1)
    v = rand(2, length, 32, seed=2)
    expected = oracle(q, k, v, torch.ones(length, length, dtype=torch.bool).tril())
    torch.testing.assert_close(
        attend(q, k, v, causal=True, scale=SCALE).out, expected.out, rtol=0, atol=1e-12
    )


def test_keys_may_be_strided_views() -> None:
    kv = rand(50, 2, 3, 16)
    k, v = kv.permute(1, 2, 0, 3)
    q = rand(3, 9, 16, seed=4)
    strided = attend(q, k, v, causal=False, scale=SCALE)
    packed = attend(q, k.contiguous(), v.contiguous(), causal=False, scale=SCALE)
    torch.testing.assert_close(strided.out, packed.out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_parts_equals_the_whole(dtype: torch.dtype) -> None:
    q, k, v = (
        rand(h, n, 64, seed=i, dtype=dtype) for i, (h, n) in enumerate([(4, 20), (2, 90), (2, 90)])
    )
    cuts = [0, 1, 33, 33, 90]  # one part is empty
    parts = [attend(q, k[:, a:b], v[:, a:b], causal=False, scale=SCALE) for a, b in pairwise(cuts)]
    expected = oracle(q, k, v, torch.ones(20, 90, dtype=torch.bool))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # scores reach 20: eps * 20 * safety
    merged = merge(parts)
    assert merged.out.dtype == dtype
    torch.testing.assert_close(merged.out.double(), expected.out, rtol=0, atol=tolerance)
    torch.testing.assert_close(merged.lse.double(), expected.lse, rtol=0, atol=1e-3)


def test_a_row_without_keys_is_zero_and_never_nan() -> None:
    q = rand(2, 3, 8, dtype=torch.float32)
    nothing = empty_partial(q)
    merged = merge([nothing, nothing])
    assert torch.equal(merged.out, torch.zeros_like(q))
    assert torch.isneginf(merged.lse).all()
    some = attend(q, q, q, causal=False, scale=SCALE)
    torch.testing.assert_close(merge([nothing, some]).out, some.out)


def test_a_part_whose_scores_are_huge_takes_all_the_weight() -> None:
    q = torch.full((1, 1, 4), 100.0)
    near = attend(q, q, torch.ones(1, 1, 4), causal=False, scale=1.0)  # score 40 000
    far = attend(q, -q, torch.zeros(1, 1, 4), causal=False, scale=1.0)
    assert torch.equal(merge([near, far]).out, torch.ones(1, 1, 4))


def test_values_of_later_keys_are_hidden_whatever_they_are() -> None:
    """On CPUs in the rows' own product, on GPUs before and after torch's kernel."""
    q = rand(4, 200, 16)
    k = rand(2, 200, 16, seed=1)
    v = rand(2, 200, 16, seed=2)
    clean = attend(q, k, v, causal=True, scale=SCALE)
    v[1, 150, 3] = torch.nan
    broken = torch.zeros(4, 200, 16, dtype=torch.bool)
    broken[2:, 150:, 3] = True
    result = attend(q, k, v, causal=True, scale=SCALE)
    assert torch.equal(result.out.isnan(), broken)
    assert torch.equal(result.out[~broken], clean.out[~broken])
    values, seen = hide_broken(v)
    assert torch.equal(seen, broken[::2])
    assert torch.equal(values, v.nan_to_num(0.0))


def test_nan_in_a_key_is_not_hidden() -> None:
    q = rand(1, 2, 8, dtype=torch.float32)
    k = rand(1, 4, 8, seed=1, dtype=torch.float32)
    k[0, 2] = torch.nan
    assert attend(q, k, k, causal=False, scale=SCALE).out.isnan().any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2"):
        attend(rand(3, 2, 8), rand(2, 2, 8), rand(2, 2, 8), causal=False, scale=1.0)
    with pytest.raises(ValueError, match="as many keys as queries, got 3, 2"):
        attend(rand(2, 2, 8), rand(2, 3, 8), rand(2, 3, 8), causal=True, scale=1.0)
