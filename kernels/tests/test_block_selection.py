"""Selection in the interpreter, against its naive reference, and with all that it is part of."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import Clustered, random_losses
from kernel_interpreter import Interpreter
from prefill_kernels import (
    BlockCSR,
    DroppedBlocks,
    block_sparse_attention,
    estimate_block_loss,
    select_blocks,
    summarize_blocks,
)
from prefill_kernels.reference import block_sparse_attention_reference, select_blocks_reference


@pytest.mark.parametrize("epsilon", [(0.0, 0.3, 2.0), (0.01, 1e9, 1e-6)])
def test_selection(interpret: Interpreter, epsilon: tuple[float, ...]) -> None:
    loss, bias, forced = random_losses()
    loss[1, 3, 5] = torch.nan
    loss[2, 4, 6] = torch.inf
    loss[0, 2, 7] = 0
    limits = torch.tensor(epsilon)
    csr, dropped = interpret(select_blocks, loss, bias, forced, limits)
    keep, expected = select_blocks_reference(loss, bias, forced, limits)
    assert csr.row_ptr.tolist() == [0, *keep.flatten(0, 1).sum(-1).cumsum(0).tolist()]
    assert csr.col[: csr.row_ptr[-1]].tolist() == keep.nonzero()[:, -1].tolist()
    assert torch.equal(dropped, expected)
    left = torch.where(keep, 0.0, loss).sum(-1)
    assert (left <= limits[:, None] * (1 + 1e-6)).all()
    assert keep[1, 3, 5]
    assert keep[2, 4, 6]
    assert keep[:, forced].all()


def test_selected_blocks_and_summaries_approximate_attention(interpret: Interpreter) -> None:
    """All steps together: summaries, estimate, selection, attention."""
    case = Clustered(group=2, q_offset=400, queries=64, seed=3)
    tiling = case.tiling
    q, k, _ = case.build()
    v = torch.randn_like(k)
    summaries = interpret(summarize_blocks, k, v, block_tokens=16)
    loss, _, bias = interpret(estimate_block_loss, q, k, summaries, tiling=tiling)
    forced = torch.zeros(loss.shape[1:], dtype=torch.bool)
    kept, left = interpret(select_blocks, loss, bias, forced, torch.full((2,), 0.1))
    share = int(kept.row_ptr[-1]) / float((bias != -torch.inf).sum())
    assert share < 0.9
    dropped = DroppedBlocks(summaries.k_mean, summaries.v_mean, left)
    out, _ = interpret(block_sparse_attention, q, k, v, kept, tiling=tiling, dropped=dropped)
    candidates = bias != -torch.inf
    row_ptr = torch.cat([torch.zeros(1), candidates.sum(-1).flatten().cumsum(0)])
    every = BlockCSR(row_ptr.to(torch.int32), candidates.nonzero()[:, -1].to(torch.int32))
    exact, _ = block_sparse_attention_reference(q, k, v, every, tiling=tiling)
    error = (out - exact).norm() / exact.norm()
    assert error < 0.15
    print(f"kept {share:.2f}, relative output error {error:.3f}")


def test_nothing_to_select() -> None:
    case = Clustered()
    q, k, summaries = case.build()
    loss, peak, bias = estimate_block_loss(q[:, :0], k, summaries, tiling=case.tiling)
    assert loss.shape == peak.shape == bias.shape == (2, 0, 10)
    csr, _ = select_blocks(loss, bias, torch.zeros(0, 10, dtype=torch.bool), torch.zeros(2))
    assert csr.row_ptr.tolist() == [0]


def test_bad_input_is_named() -> None:
    loss, bias, forced = random_losses()
    with pytest.raises(ValueError, match=r"forced is torch\.float32 \[5, 70\], expected bool"):
        select_blocks(loss, bias, forced.float(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"epsilon has shape \[2\], expected \[3\]"):
        select_blocks(loss, bias, forced, torch.zeros(2))
