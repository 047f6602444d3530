"""The four steps in one call, in the interpreter, against the four references."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import Clustered
from kernel_interpreter import Interpreter
from prefill_kernels import BlockCSR, DroppedBlocks, adaptive_attention
from prefill_kernels.reference import (
    block_sparse_attention_reference,
    estimate_block_loss_reference,
    select_blocks_reference,
    summarize_blocks_reference,
)


@pytest.mark.parametrize("epsilon", [0.1, torch.tensor([0.0, 0.3])], ids=["one", "per head"])
def test_adaptive_attention(interpret: Interpreter, epsilon: float | torch.Tensor) -> None:
    case = Clustered(group=2, q_offset=400, queries=64, seed=3)
    tiling = case.tiling
    q, k, _ = case.build()
    v = torch.randn_like(k)
    found = interpret(adaptive_attention, q, k, v, tiling=tiling, epsilon=epsilon)

    summaries = summarize_blocks_reference(k, v, block_tokens=case.block)
    loss, _, bias = estimate_block_loss_reference(q, k, summaries, tiling=tiling)
    forced = torch.zeros(loss.shape[1:], dtype=torch.bool)
    forced[:, 0] = True
    limits = torch.as_tensor(epsilon, dtype=torch.float64).expand(2)
    keep, left = select_blocks_reference(loss, bias, forced, limits)
    row_ptr = torch.cat([torch.zeros(1), keep.sum(-1).flatten().cumsum(0)]).to(torch.int32)
    kept = BlockCSR(row_ptr, keep.nonzero()[:, -1].to(torch.int32))
    assert torch.equal(found.kept.row_ptr, kept.row_ptr)
    assert torch.equal(found.kept.col[: row_ptr[-1]], kept.col)
    assert found.candidates == int((bias != -torch.inf).sum())
    assert 0 < int(row_ptr[-1]) < found.candidates
    assert keep[:, :, 0].all()

    dropped = DroppedBlocks(summaries.k_mean, summaries.v_mean, left)
    out, lse = block_sparse_attention_reference(q, k, v, kept, tiling=tiling, dropped=dropped)
    torch.testing.assert_close(found.out.double(), out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.lse.double(), lse, atol=1e-3, rtol=1e-3)


def test_adaptive_attention_over_pages(interpret: Interpreter) -> None:
    case = Clustered(group=2, q_offset=400, queries=64, seed=3)
    q, k, _ = case.build()
    v = torch.randn_like(k)
    plain = interpret(adaptive_attention, q, k, v, tiling=case.tiling, epsilon=0.1)
    blocks = k.shape[1] // case.block
    table = torch.randperm(blocks).to(torch.int32)
    pages = []
    for x in (k, v):
        page = torch.empty(blocks, case.block, 2, case.head_dim)
        page[table.long()] = x.unflatten(1, (blocks, case.block)).permute(1, 2, 0, 3)
        pages.append(page)
    tiling = type(case.tiling)(case.block, case.tile, case.q_offset, block_table=table)
    paged = interpret(adaptive_attention, q, *pages, tiling=tiling, epsilon=0.1)
    assert torch.equal(paged.kept.row_ptr, plain.kept.row_ptr)
    torch.testing.assert_close(paged.out, plain.out)
