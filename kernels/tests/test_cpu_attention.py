"""Attention through oneDNN products against a float64 softmax, over the borders of its strips."""

from __future__ import annotations

import pytest
import torch
from prefill_kernels.cpu.attention import attend_rows
from prefill_kernels.cpu.matmul import matmul_nt, uses_onednn
from torch import Tensor

SCALE = 0.2


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = q.double() @ k.double().mT * SCALE
    if hidden is not None:
        scores[..., k.shape[1] - hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]).nan_to_num(0.0) @ v.double(), lse


@pytest.mark.parametrize(
    ("rows", "keys"),
    [(1, 1), (3, 7), (50, 31), (700, 3001), (2048, 513), (2100, 1100)],  # over strips of either
)
@pytest.mark.parametrize("last", [0, 1, 5, 600])
def test_rows_equal_a_softmax(rows: int, keys: int, last: int) -> None:
    q = rand(2, rows, 16)
    k = rand(2, keys, 16, seed=1)
    v = rand(2, keys, 16, seed=2)
    assert uses_onednn(q)
    hidden = rand(rows, min(last, keys), seed=3) > 0 if last else None
    out, lse = attend_rows(q, k, v, SCALE, hidden=hidden)
    expected, expected_lse = oracle(q, k, v, hidden)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)


def test_a_row_without_keys_is_zero_in_every_dtype() -> None:
    q = rand(1, 4, 16)
    k = rand(1, 3, 16, seed=1)
    hidden = torch.tensor([[True] * 3, [False] * 3, [True, False, True], [False] * 3])
    for dtype in (torch.float32, torch.float64):
        out, lse = attend_rows(q.to(dtype), k.to(dtype), k.to(dtype), SCALE, hidden=hidden)
        assert lse[0, 0] == -torch.inf
        assert not out[0, 0].any()
        assert lse[0, 1:].isfinite().all()
        torch.testing.assert_close(out[0, 2].float(), k[0, 1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_broken_reaches_the_rows_that_see_it(dtype: torch.dtype, value: float) -> None:
    """0 times NaN is NaN: hidden keys must have no part, rather than weight 0."""
    q = rand(2, 6, 16).to(dtype)
    k = rand(2, 9, 16, seed=1).to(dtype)
    v = rand(2, 9, 16, seed=2).to(dtype)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    clean, clean_lse = attend_rows(q, k, v, SCALE, hidden=hidden)
    broken = v.clone()
    broken[1, 3 + 4, 5] = value
    out, lse = attend_rows(q, k, broken, SCALE, hidden=hidden)
    expected = torch.zeros(2, 6, 16, dtype=torch.bool)
    expected[1, 4:, 5] = True
    assert torch.equal(~out.isfinite(), expected)
    assert torch.equal(out[~expected], clean[~expected])
    assert torch.equal(lse, clean_lse)

    broken = k.clone()
    broken[1, 3 + 4] = value
    out, lse = attend_rows(q, broken, v, SCALE, hidden=hidden)
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, :4], clean[1, :4])
    assert out[1, 4:].isnan().all()
    assert lse.isnan().nonzero().tolist() == [[1, 4], [1, 5]]


def test_peaks_that_rise_from_strip_to_strip() -> None:
    """The running maximum moves in every strip, over more than exp2's range in float32."""
    q = torch.ones(1, 2048, 1)
    v = rand(1, 3000, 1)  # strips of 512 keys
    k = torch.arange(0.0, 300_000.0, 100.0)[None, :, None]
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        out, lse = attend_rows(q, keys, values, SCALE)
        torch.testing.assert_close(out, v[:, -1:].expand(1, 2048, 1))
        torch.testing.assert_close(lse, torch.full((1, 2048), 299_900 * SCALE))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    q = rand(1, 5, 16)
    k = rand(1, 9, 16, seed=1)
    q[0, 2, 3] = torch.nan
    q[0, 4, 0] = torch.inf
    out, lse = attend_rows(q, k, k, SCALE)
    assert out[0, [2, 4]].isnan().any(-1).all()
    good = [0, 1, 3]
    expected, expected_lse = oracle(q[:, good], k, k)
    torch.testing.assert_close(out[:, good].double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[:, good].double(), expected_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_product_of_any_strides(dtype: torch.dtype) -> None:
    x = rand(5, 24).to(dtype)
    wide = rand(7, 3, 24, seed=1).to(dtype)
    for y in (
        wide[:, 0],
        wide[:, 1].contiguous(),
        rand(24, 3, 7, seed=3).to(dtype)[:, 0].T,
        wide[:, 2].T.contiguous().T,
        wide[:0, 0],
    ):
        torch.testing.assert_close(matmul_nt(x, y), x @ y.T)
    assert matmul_nt(x[:0], wide[:, 0]).shape == (0, 7)
    strided = rand(5, 48, seed=2).to(dtype)[:, ::2]
    torch.testing.assert_close(matmul_nt(strided, wide[:, 0]), strided @ wide[:, 0].T)


@pytest.mark.parametrize("rows", [4096, 4097, 9000])
def test_product_over_the_borders_of_its_strips(rows: int) -> None:
    """Keys and values of one head among several, more of them than are copied at once."""
    kv = rand(rows, 2, 8, seed=1)
    q = rand(3, 8)
    p = rand(2, 3, rows, seed=2).softmax(-1)
    scores = q.double() @ kv[:, 0].double().T
    torch.testing.assert_close(matmul_nt(q, kv[:, 0]).double(), scores, rtol=0, atol=1e-5)
    mixed = p.double() @ kv[:, 1].double()
    torch.testing.assert_close(matmul_nt(p, kv[:, 1].T).double(), mixed, rtol=0, atol=1e-6)
