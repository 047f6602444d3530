"""Block summaries, merge and page copies in the interpreter, against their naive references."""

from __future__ import annotations

import pytest
import torch
from prefill_kernels.block_summaries import block_summaries, block_summaries_reference
from prefill_kernels.merge import merge_partials, merge_reference
from prefill_kernels.pages import (
    gather_reference,
    scatter_reference,
    scatter_to_pages,
    slots_of_blocks,
)

from tests.kernels.interpreter import Interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "block"), [(80, 16), (64, 64)])
def test_summaries(interpret: Interpreter, dtype: torch.dtype, head_dim: int, block: int) -> None:
    torch.manual_seed(0)
    kv = torch.randn(3 * block + 5, 2, 3, head_dim).to(dtype)
    kv[3 * block :] = torch.nan
    k, v = kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)
    expected = block_summaries_reference(k, v, block_tokens=block)
    got = interpret("block_summaries.block_summaries", k, v, block_tokens=block)
    assert [x.shape for x in got] == [(3, 3, head_dim)] * 4 + [(3, 3)]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
    pages = torch.full((7, 2, block, 3, head_dim), torch.nan).to(dtype)
    table = torch.tensor([5, 0, 2], dtype=torch.int32)
    for j, page in enumerate(table):
        pages[page] = kv[j * block : (j + 1) * block].transpose(0, 1)
    paged = interpret(
        "block_summaries.block_summaries",
        pages[:, 0], pages[:, 1], block_tokens=block, block_table=table,
    )  # fmt: skip
    assert all(map(torch.equal, paged, got))


def test_summaries_of_equal_keys_and_of_none(interpret: Interpreter) -> None:
    k = torch.ones(1, 32, 64)
    _, variance, _, far, far_count = interpret(
        "block_summaries.block_summaries", k, k, block_tokens=16
    )
    assert (variance == 0).all()
    assert (far == 1).all()
    assert (far_count == 1).all()
    assert [x.shape[1] for x in block_summaries(k, k, block_tokens=64)] == [0] * 5
    with pytest.raises(ValueError, match="block_tokens = 24 is not a power of two"):
        block_summaries(k, k, block_tokens=24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_merge(interpret: Interpreter, dtype: torch.dtype, parts: int) -> None:
    torch.manual_seed(parts)
    outs = [torch.randn(3, 37, 80).to(dtype) for _ in range(parts)]
    lses = [torch.randn(3, 37) * 30 for _ in range(parts)]
    for i in range(parts):
        lses[i][:, 5 * i] = -torch.inf
        lses[i][0, 30] = -torch.inf  # no part has a key
        outs[i][lses[i] == -torch.inf] = 0
    out, lse = interpret("merge.merge_partials", outs, lses)
    expected_out, expected_lse = merge_reference(outs, lses)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)
    assert out.dtype == dtype
    assert lse[0, 30] == -torch.inf
    assert (out[0, 30] == 0).all()


def test_merge_of_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="0 outputs and 0 LSEs"):
        merge_partials([], [])
    with pytest.raises(ValueError, match=r"\[2, 4\] does not fit \[2, 3, 16\]"):
        merge_partials([torch.zeros(2, 3, 16)], [torch.zeros(2, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_pages(interpret: Interpreter, dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(0)
    pages = torch.randn(9, 2, 4, 3, 80).to(dtype)[:, 1]  # a strided view, as of a vLLM cache
    slots = torch.randperm(36)[:21].to(index)
    slots[[3, 17]] = -1
    rows = interpret("pages.gather_from_pages", pages, slots)
    assert torch.equal(rows, gather_reference(pages, slots))
    source = torch.randn(21, 2, 3, 80).to(dtype)[:, 0]
    expected = pages.clone()
    scatter_reference(source, expected, slots)
    _, scattered, _ = interpret("pages.scatter_to_pages", source, pages, slots)
    assert torch.equal(scattered, expected)


def test_slots_of_a_block_table() -> None:
    table = torch.tensor([3, 0, 7], dtype=torch.int32)
    slots = slots_of_blocks(table, 9, 4)
    assert slots.tolist() == [12, 13, 14, 15, 0, 1, 2, 3, 28]
    with pytest.raises(ValueError, match="13 tokens exceed 3 pages of 4"):
        slots_of_blocks(table, 13, 4)
    with pytest.raises(ValueError, match="do not fit"):
        scatter_to_pages(torch.zeros(2, 3, 16), torch.zeros(4, 4, 2, 16), slots[:2])
