"""The service's CPU back end against the kernels' references, and both against each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_inputs import Clustered, random_losses
from kernel_interpreter import Interpreter
from prefill_kernels import BlockCSR
from prefill_kernels.reference import (
    block_sparse_attention_reference,
    estimate_block_loss_reference,
    select_blocks_reference,
)

from prefill_service.attention.sparse.cuda_backend import CudaBackend
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.problem import SparseProblem, SparseResult
from prefill_service.attention.sparse.selection import estimate, forced_blocks, select
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles
from tests.attention.problems import (
    attend_on_cpu,
    lone_needles,
    sparse_problem,
    summaries_of,
    with_row_limit,
)


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    interpreter.start()
    yield interpreter
    interpreter.close()


def tiles_of(case: Clustered) -> Tiles:
    return Tiles(case.queries, case.q_offset, case.tile, case.block)


def attend_in_kernels(interpret: Interpreter, problem: SparseProblem) -> SparseResult:
    result: SparseResult = interpret(CudaBackend.attend_sparse, CudaBackend(), problem, NoHooks())
    return result


@pytest.mark.parametrize(
    "case",
    [
        Clustered(tile=32, queries=70, q_offset=333),
        Clustered(tile=48, queries=70, q_offset=333),
        Clustered(tile=32, queries=33, q_offset=320),
        Clustered(tile=16, queries=1, q_offset=203),
        Clustered(tile=128, queries=99, q_offset=130),
    ],
    ids=str,
)
def test_the_reference_is_what_the_cpu_estimates(case: Clustered) -> None:
    q, k, summaries = case.build()
    tiles = tiles_of(case)
    none = BlockCSR(torch.zeros(2 * tiles.count + 1, dtype=torch.int32), torch.zeros(0))
    _, lse = block_sparse_attention_reference(q, k, k, none, tiling=case.tiling)
    local = tiles.pack(lse[..., None].float(), 2)[..., 0]
    known = BlockSummaries(*summaries).first(tiles.blocks)
    found = estimate(tiles.pack(q, 2), local, known, tiles=tiles, scale=case.head_dim**-0.5)
    expected = estimate_block_loss_reference(q, k, summaries, tiling=case.tiling)
    for got, x in ((found.loss, expected.loss), (found.peak, expected.peak)):
        torch.testing.assert_close(got.double(), x[..., : tiles.blocks], atol=1e-6, rtol=1e-4)
    bias = expected.bias[..., : tiles.blocks]
    torch.testing.assert_close(found.bias.double(), bias, atol=1e-5, rtol=1e-5)


def test_the_reference_is_what_the_cpu_selects() -> None:
    """One meaning on both back ends."""
    loss, bias, forced = random_losses()
    loss[1, 3, 5] = torch.nan
    for limit in (0.0, 0.01, 0.3, 2.0):
        epsilon = torch.full((3,), limit)
        keep, _ = select_blocks_reference(loss, bias, forced, epsilon)
        assert torch.equal(keep, select(loss, forced, epsilon))


def test_both_back_ends_attend_alike(interpret: Interpreter) -> None:
    """What a GPU computes is what a CPU computes, from the queries to the attention output."""
    case = Clustered(group=2, q_offset=653, queries=82, seed=3)
    q, k, _ = case.build()
    v = torch.randn_like(k)
    tiles = tiles_of(case)
    epsilon = torch.tensor([0.3, 0.4])
    problem = sparse_problem(
        q,
        (k, v),
        tiles,
        epsilon=epsilon,
        forced=forced_blocks(tiles, 1, [620, 652, 684]),
        scale=case.head_dim**-0.5,
        row_limit=epsilon / 2,
    )
    a = attend_in_kernels(interpret, problem)
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


def test_both_keep_what_one_row_alone_looks_for(interpret: Interpreter) -> None:
    tiles = Tiles(90, 331, 32, 16)
    for seed in range(3):
        problem, blocks = lone_needles(tiles, 0.06, seed)
        problem = with_row_limit(problem, 0.05)
        q, k, v = (x.float() for x in (problem.q, problem.k, problem.v))
        summaries = summaries_of(k, v, tiles)
        problem = replace(problem, q=q, k=k, v=v, summaries=summaries)
        for used in (attend_in_kernels(interpret, problem), attend_on_cpu(problem)):
            kept = torch.zeros_like(used.keep).scatter_(2, blocks[..., None], True)
            assert torch.equal(used.keep, kept)


def test_a_query_that_is_not_a_number_poisons_itself_alone(interpret: Interpreter) -> None:
    """A GPU keeps all blocks of its tile, a CPU those that the tile's other queries ask for."""
    case = Clustered(group=2, q_offset=320, queries=64, seed=3)
    q, k, _ = case.build()
    q[1, 5, 3] = torch.nan
    tiles = tiles_of(case)
    epsilon = torch.tensor([0.4, 0.4])
    problem = sparse_problem(
        q,
        (k, k),
        tiles,
        epsilon=epsilon,
        forced=forced_blocks(tiles, 1, [304, 336]),
        scale=case.head_dim**-0.5,
        row_limit=epsilon / 2,
    )
    a = attend_in_kernels(interpret, problem)
    b = attend_on_cpu(problem)
    for got in (a, b):
        assert got.out.isnan().all(-1).nonzero().tolist() == [[1, 5]]
        assert got.out.isnan().any(-1).sum() == 1
    assert a.keep[0, 0, : tiles.candidates(0)].all()
    assert not a.keep[0, 1, : tiles.candidates(1)].all()
    assert not b.keep[0, 0, : tiles.candidates(0)].all()
