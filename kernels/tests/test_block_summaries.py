"""Block summaries in the interpreter, against their naive reference."""

from __future__ import annotations

import pytest
import torch
from kernel_interpreter import Interpreter
from prefill_kernels import summarize_blocks
from prefill_kernels.reference import summarize_blocks_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "block"), [(80, 16), (64, 64)])
def test_summaries(interpret: Interpreter, dtype: torch.dtype, head_dim: int, block: int) -> None:
    torch.manual_seed(0)
    kv = torch.randn(3 * block + 5, 2, 3, head_dim).to(dtype)
    kv[3 * block :] = torch.nan
    k = kv[:, 0].transpose(0, 1)
    v = kv[:, 1].transpose(0, 1)
    expected = summarize_blocks_reference(k, v, block_tokens=block)
    got = interpret(summarize_blocks, k, v, block_tokens=block)
    assert [x.shape for x in got] == [(3, 3, head_dim)] * 4 + [(3, 3)]
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-5)
    pages = torch.full((7, 2, block, 3, head_dim), torch.nan).to(dtype)
    table = torch.tensor([5, 0, 2], dtype=torch.int32)
    for j, page in enumerate(table):
        pages[page] = kv[j * block : (j + 1) * block].transpose(0, 1)
    paged = interpret(
        summarize_blocks, pages[:, 0], pages[:, 1], block_tokens=block, block_table=table
    )
    assert all(map(torch.equal, paged, got))


def test_summaries_of_equal_keys_and_of_none(interpret: Interpreter) -> None:
    k = torch.ones(1, 32, 64)
    _, variance, _, far, far_count = interpret(summarize_blocks, k, k, block_tokens=16)
    assert (variance == 0).all()
    assert (far == 1).all()
    assert (far_count == 1).all()
    assert [x.shape[1] for x in summarize_blocks(k, k, block_tokens=64)] == [0] * 5
    with pytest.raises(ValueError, match="block_tokens = 24 is not a power of two"):
        summarize_blocks(k, k, block_tokens=24)
