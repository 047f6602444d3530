"""Selection in the interpreter, against its naive reference, and with all that it is part of."""

from __future__ import annotations

import pytest
import torch
from prefill_kernels.block_loss import estimate_loss
from prefill_kernels.block_selection import select_blocks, select_reference
from prefill_kernels.block_sparse_attention import block_sparse_reference
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.sparse.cuda_backend import CudaBackend
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.selection import forced_blocks, select
from prefill_service.attention.sparse.tiles import Tiles
from tests.attention.problems import attend_on_cpu, sparse_problem
from tests.kernels.interpreter import Interpreter
from tests.kernels.test_loss import inputs

CUDA = "prefill_service.attention.sparse.cuda_backend.CudaBackend.attend_sparse"


def losses(tiles: int = 5, blocks: int = 70, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    loss = torch.rand(3, tiles, blocks) ** 8 * torch.rand(3, tiles, 1)
    bias = torch.randn_like(loss)
    for t in range(tiles):
        loss[:, t, t * 17 :] = 0  # the first tile has no candidate
        bias[:, t, t * 17 :] = -torch.inf
    forced = (torch.rand(tiles, blocks) < 0.1) & (bias[0] != -torch.inf)
    return loss, bias, forced


@pytest.mark.parametrize("epsilon", [(0.0, 0.3, 2.0), (0.01, 1e9, 1e-6)])
def test_selection(interpret: Interpreter, epsilon: tuple[float, ...]) -> None:
    loss, bias, forced = losses()
    loss[1, 3, 5] = torch.nan
    loss[2, 4, 6] = torch.inf
    loss[0, 2, 7] = 0
    limits = torch.tensor(epsilon)
    csr, dropped = interpret("selection.select_blocks", loss, bias, forced, limits)
    keep, expected = select_reference(loss, bias, forced, limits)
    assert csr.row_ptr.tolist() == [0, *keep.flatten(0, 1).sum(-1).cumsum(0).tolist()]
    assert csr.col[: csr.row_ptr[-1]].tolist() == keep.nonzero()[:, -1].tolist()
    assert torch.equal(dropped, expected)
    left = torch.where(keep, 0.0, loss).sum(-1)
    assert (left <= limits[:, None] * (1 + 1e-6)).all()
    assert keep[1, 3, 5]
    assert keep[2, 4, 6]
    assert keep[:, forced].all()


def test_the_reference_is_what_the_cpu_selects() -> None:
    """One meaning on both back ends."""
    loss, bias, forced = losses()
    loss[1, 3, 5] = torch.nan
    for limit in (0.0, 0.01, 0.3, 2.0):
        epsilon = torch.full((3,), limit)
        keep, _ = select_reference(loss, bias, forced, epsilon)
        assert torch.equal(keep, select(loss, forced, epsilon))


def test_both_back_ends_attend_alike(interpret: Interpreter) -> None:
    """What a GPU computes is what a CPU computes, from the queries to the attention output."""
    (q, k, *_), options = inputs(group=2, q_offset=653, queries=82, seed=3)
    v = torch.randn_like(k)
    tiles = Tiles(q.shape[1], options["q_offset"], options["tile_tokens"], options["block_tokens"])
    forced = forced_blocks(tiles, 1, [620, 652, 684])
    epsilon = torch.tensor([0.3, 0.4])
    problem = sparse_problem(
        q,
        (k, v),
        tiles,
        epsilon=epsilon,
        forced=forced,
        scale=options["scale"],
        row_limit=epsilon / 2,
    )
    a = interpret(CUDA, CudaBackend(), problem, NoHooks())
    b = attend_on_cpu(problem)
    differs = a.keep != b.keep
    assert differs.sum() <= 1  # rounding may move one block over its threshold
    density = b.keep.sum((1, 2)) / sum(tiles.candidates(t) for t in range(tiles.count))
    assert (density > 0.1).all()
    assert (density < 0.6).all()  # above, a CPU attends to all blocks
    # [q_heads, queries]: rows of tiles whose blocks are the same.
    same = ~differs.any(-1).repeat_interleave(2, 0).repeat_interleave(32, 1)[:, : q.shape[1]]
    torch.testing.assert_close(a.out[same], b.out[same], atol=1e-4, rtol=0)
    torch.testing.assert_close(a.lse[same], b.lse[same], atol=1e-4, rtol=0)
    bias = a.bias.masked_fill(differs, 0), b.bias.masked_fill(differs, 0)
    torch.testing.assert_close(*bias, atol=1e-4, rtol=0)


def test_a_query_that_is_not_a_number_poisons_itself_alone(interpret: Interpreter) -> None:
    """A GPU keeps all blocks of its tile, a CPU those that the tile's other queries ask for."""
    (q, k, *_), options = inputs(group=2, q_offset=320, queries=64, seed=3)
    q[1, 5, 3] = torch.nan
    tiles = Tiles(q.shape[1], options["q_offset"], options["tile_tokens"], options["block_tokens"])
    forced = forced_blocks(tiles, 1, [304, 336])
    epsilon = torch.tensor([0.4, 0.4])
    problem = sparse_problem(
        q,
        (k, k),
        tiles,
        epsilon=epsilon,
        forced=forced,
        scale=options["scale"],
        row_limit=epsilon / 2,
    )
    a = interpret(CUDA, CudaBackend(), problem, NoHooks())
    b = attend_on_cpu(problem)
    for got in (a, b):
        assert got.out.isnan().all(-1).nonzero().tolist() == [[1, 5]]
        assert got.out.isnan().any(-1).sum() == 1
    assert a.keep[0, 0, : tiles.candidates(0)].all()
    assert not a.keep[0, 1, : tiles.candidates(1)].all()
    assert not b.keep[0, 0, : tiles.candidates(0)].all()


def test_selected_blocks_and_summaries_approximate_attention(interpret: Interpreter) -> None:
    """All steps together: summaries, estimate, selection, attention."""
    (q, k, *_), options = inputs(group=2, q_offset=400, queries=64, seed=3)
    v = torch.randn_like(k)
    known = interpret("block_summaries.block_summaries", k, v, block_tokens=16)
    k_mean, k_var, v_mean, *far = known
    loss, _, bias = interpret("loss.estimate_loss", q, k, k_mean, k_var, *far, **options)
    forced = torch.zeros(loss.shape[1:], dtype=torch.bool)
    csr, dropped = interpret("selection.select_blocks", loss, bias, forced, torch.full((2,), 0.1))
    kept = int(csr.row_ptr[-1]) / float((bias != -torch.inf).sum())
    assert kept < 0.9
    out, _ = interpret(
        "block_sparse.block_sparse_attention",
        q, k, v, csr, summaries=(k_mean, v_mean), bias=dropped, **options,
    )  # fmt: skip
    candidates = bias != -torch.inf
    row_ptr = torch.cat([torch.zeros(1), candidates.sum(-1).flatten().cumsum(0)])
    every = BlockCSR(row_ptr.to(torch.int32), candidates.nonzero()[:, -1].to(torch.int32))
    exact, _ = block_sparse_reference(q, k, v, every, **options)
    error = (out - exact).norm() / exact.norm()
    assert error < 0.15
    print(f"kept {kept:.2f}, relative output error {error:.3f}")


def test_nothing_to_select() -> None:
    (q, k, *summaries), options = inputs()
    loss, peak, bias = estimate_loss(q[:, :0], k, *summaries, **options)
    assert loss.shape == peak.shape == bias.shape == (2, 0, 10)
    csr, _ = select_blocks(loss, bias, torch.zeros(0, 10, dtype=torch.bool), torch.zeros(2))
    assert csr.row_ptr.tolist() == [0]


def test_bad_input_is_named() -> None:
    loss, bias, forced = losses()
    with pytest.raises(ValueError, match=r"forced is torch\.float32 \[5, 70\], expected bool"):
        select_blocks(loss, bias, forced.float(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"epsilon has shape \[2\], expected \[3\]"):
        select_blocks(loss, bias, forced, torch.zeros(2))
