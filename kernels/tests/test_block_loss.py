"""Estimated losses in the interpreter, against their naive reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_inputs import Clustered
from kernel_interpreter import Interpreter
from prefill_kernels import Summaries, Tiling, estimate_block_loss
from prefill_kernels.reference import estimate_block_loss_reference, summarize_blocks_reference


@pytest.mark.parametrize(
    "case",
    [
        Clustered(),
        Clustered(group=7, head_dim=80, dtype=torch.float16, tile=48),
        Clustered(group=1, head_dim=128, dtype=torch.bfloat16, q_offset=333, queries=33),
        Clustered(queries=1, q_offset=200),
        Clustered(queries=30, q_offset=5, tile=128),
        Clustered(tile=40, head_dim=96, q_offset=37),
        Clustered(tile=30, group=3),
    ],
    ids=str,
)
def test_estimate_equals_float64(interpret: Interpreter, case: Clustered) -> None:
    args = case.build()
    found = interpret(estimate_block_loss, *args, tiling=case.tiling)
    expected = estimate_block_loss_reference(*args, tiling=case.tiling)
    torch.testing.assert_close(found.bias.double(), expected.bias, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.loss.double(), expected.loss, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(found.peak.double(), expected.peak, atol=1e-7, rtol=1e-4)
    assert ((found.loss > 0) == (found.bias != -torch.inf)).all()
    assert (2 * found.peak >= found.loss).all()


def test_estimate_through_a_block_table(interpret: Interpreter) -> None:
    case = Clustered(queries=7, q_offset=153)
    q, k, summaries = case.build()
    plain = interpret(estimate_block_loss, q, k, summaries, tiling=case.tiling)
    pages = torch.full((20, 16, 2, 64), torch.nan)
    table = torch.randperm(20)[:10].to(torch.int32)
    for j, page in enumerate(table):
        pages[page] = k[:, 16 * j : 16 * j + 16].transpose(0, 1)
    paged = replace(case.tiling, block_table=table)
    found = interpret(estimate_block_loss, q, pages, summaries, tiling=paged)
    assert all(map(torch.equal, plain, found))


def test_estimate_finds_the_needle(interpret: Interpreter) -> None:
    """One key that the queries look for, in a block whose mean does not show it."""
    case = Clustered(q_offset=160, queries=32)
    q, k, _ = case.build()
    k *= 0.3
    q[:] = torch.randn(64)
    k[:, 70] = q[0, 0] * 2
    k[:, 64:70] -= k[:, 70:71] / 15
    k[:, 71:80] -= k[:, 70:71] / 15
    exact = summarize_blocks_reference(k, k, block_tokens=16)
    summaries = Summaries(*(x.float() for x in exact))
    loss, *_ = interpret(estimate_block_loss, q, k, summaries, tiling=case.tiling)
    assert (loss[:, :, :10].argmax(-1) == 4).all()
    assert (loss[:, :, 4] > 0.5).all()


def test_bad_input_is_named() -> None:
    q, k, summaries = Clustered().build()
    short = Summaries(*(x[:, :8] for x in summaries))
    with pytest.raises(ValueError, match="summaries of 8 blocks do not reach"):
        estimate_block_loss(q, k, short, tiling=Tiling(16, 32, 90))
