"""The CPU back end against float64, with the same kept blocks and summaries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prefill_service.attention.sparse.cpu_backend import CpuBackend
from prefill_service.attention.sparse.gathered_attention import (
    PackedTiles,
    kept_attention,
    local_attention,
)
from prefill_service.attention.sparse.hooks import NoHooks
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.selection import forced_blocks, to_csr
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention.sparse.summary_attention import (
    attend_summaries,
    merge_with_summaries,
)
from prefill_service.attention.sparse.tiles import Tiles
from tests.attention import oracle
from tests.attention.oracle import rand
from tests.attention.problems import attend_on_cpu, sparse_problem

SCALE = 0.3


def problem(
    queries: int,
    q_offset: int,
    group: int,
    dtype: torch.dtype = torch.float64,
    block: int = 64,
    head_dim: int = 16,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tiles, BlockSummaries]:
    """Two KV heads, in the layout of the exchange's buffer."""
    tiles = Tiles(queries, q_offset, 128, block)
    q = rand(2 * group, queries, head_dim, dtype=dtype)
    kv = rand(tiles.keys, 2, 2, head_dim, seed=1, dtype=dtype)
    k, v = kv.permute(1, 2, 0, 3)
    known = summarize(k[:, : tiles.blocks * block], v[:, : tiles.blocks * block], block)
    return q, k, v, tiles, known


def attend_with(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, known: BlockSummaries, keep: Tensor, bias: Tensor
) -> Tensor:
    """``bias`` is that of all candidates, kept or not."""
    scratch = ScratchBuffers()
    rows = tiles.pack(q, 2)
    packed = PackedTiles(rows=rows, k=k, v=v, tiles=tiles, scale=SCALE)
    local = local_attention(packed, scratch)
    if not tiles.blocks:
        return tiles.unpack(local.out, len(q))
    kept = kept_attention(packed, to_csr(keep), scratch)
    summaries = attend_summaries(rows, local.lse, known.k_mean, bias=bias, scale=SCALE)
    dropped = (bias > -torch.inf) & ~keep
    merged = merge_with_summaries(local, kept, summaries, v_mean=known.v_mean, dropped=dropped)
    return tiles.unpack(merged.out, len(q))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(
    ("queries", "q_offset"), [(256, 512), (200, 517), (1, 1000), (128, 0), (5, 64), (130, 63)]
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_given_blocks(queries: int, q_offset: int, group: int, block: int, density: float) -> None:
    q, k, v, tiles, known = problem(queries, q_offset, group, block=block)
    generator = torch.Generator().manual_seed(7)
    keep = torch.rand(2, tiles.count, tiles.blocks, generator=generator) < density
    bias = rand(2, tiles.count, tiles.blocks, seed=3)
    for tile in range(tiles.count):
        keep[:, tile, tiles.candidates(tile) :] = False
        bias[:, tile, tiles.candidates(tile) :] = -torch.inf
    got = attend_with(q, k, v, tiles, known, keep, bias)
    used = bias.masked_fill(keep, -torch.inf)
    expected = oracle.used_output(q, k, v, tiles, keep, used, known, SCALE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # merged by the kernel's fp32 LSE


@pytest.mark.parametrize("shift", [-200.0, -60.0, 60.0, 200.0])
def test_summaries_far_above_or_below_the_truth(shift: float) -> None:
    # exp(200) is no float32: neither a hopeless estimate nor a lost local region may overflow.
    q, k, v, tiles, known = problem(200, 517, 4, torch.float32)
    keep = rand(2, tiles.count, tiles.blocks, seed=8) > 0
    bias = rand(2, tiles.count, tiles.blocks, seed=3, dtype=torch.float32) + shift
    for tile in range(tiles.count):
        keep[:, tile, tiles.candidates(tile) :] = False
        bias[:, tile, tiles.candidates(tile) :] = -torch.inf
    got = attend_with(q, k, v, tiles, known, keep, bias)
    used = bias.masked_fill(keep, -torch.inf)
    expected = oracle.used_output(q, k, v, tiles, keep, used, known, SCALE)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)


def test_long_runs_are_cut() -> None:
    q, k, v, tiles, known = problem(700, 1030, 4)
    forced = forced_blocks(tiles, 1, [990 + 128 * tile for tile in range(tiles.count)])
    epsilon = torch.full((2,), 0.3)
    asked = sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE)
    whole = attend_on_cpu(asked)
    cut = CpuBackend(dense_above=2.0, max_scores=1).attend_sparse(asked, NoHooks())
    assert cut.keep.shape == whole.keep.shape
    assert cut.attended(tiles).shape == (2,)
    expected = oracle.used_output(q, k, v, tiles, cut.keep, cut.bias, known, SCALE)
    torch.testing.assert_close(cut.out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v, tiles, known = problem(300, 700, 4, dtype, head_dim=64)
    epsilon = torch.full((2,), 0.2)
    forced = forced_blocks(tiles, 1, [600, 730, 860])
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE / 2)
    )
    expected = oracle.used_output(q, k, v, tiles, got.keep, got.bias, known, SCALE / 2)
    error = (got.out.double() - expected).norm() / expected.norm()
    assert got.out.dtype == dtype
    assert error < {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert 0 < got.keep.double().mean() < 1


@pytest.mark.parametrize(("queries", "q_offset"), [(256, 1024), (77, 901), (1, 1), (1, 0)])
def test_epsilon_zero_is_dense(queries: int, q_offset: int) -> None:
    q, k, v, tiles, _ = problem(queries, q_offset, 4)
    forced = forced_blocks(tiles, 0, [q_offset + 10_000] * tiles.count)
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=torch.zeros(2), forced=forced, scale=SCALE)
    )
    expected = oracle.dense(q, k, v, q_offset, SCALE)
    torch.testing.assert_close(got.out, expected, rtol=0, atol=1e-6)
    assert got.attended(tiles).tolist() == [tiles.causal_keys] * 2


def test_equal_keys_need_no_block_at_all() -> None:
    # Where all keys of a block are alike its summary is exact, however much mass it has.
    q, k, v, tiles, _ = problem(128, 640, 4)
    k, v = k.clone(), v.clone()
    k[:, :640] = rand(2, 10, 16, seed=5).repeat_interleave(64, 1)
    forced = forced_blocks(tiles, 0, [10_000])
    epsilon = torch.full((2,), 0.5)
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE)
    )
    # All that is estimated to be lost are single keys' shares (the outlier guard).
    assert not got.keep.any()
    expected = oracle.dense(q, k, v, 640, SCALE)
    torch.testing.assert_close(got.out, expected, rtol=0, atol=1e-6)


def test_heads_that_need_most_keys_are_attended_densely() -> None:
    # Head 0 is diffuse, head 1 has equal keys in each block and needs none of them.
    q, k, v, tiles, _ = problem(200, 1920, 4)
    k, v = k.clone(), v.clone()
    k[1, :1920] = rand(30, 16, seed=5).repeat_interleave(64, 0)
    known = summarize(k[:, : tiles.blocks * 64], v[:, : tiles.blocks * 64], 64)
    forced = forced_blocks(tiles, 0, [10_000] * 2)
    epsilon = torch.tensor([0.01, 0.5])
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE)
    )
    attended = got.attended(tiles).tolist()
    assert attended[0] == tiles.causal_keys
    assert attended[1] < 0.2 * tiles.causal_keys
    expected = oracle.dense(q, k, v, 1920, SCALE)
    torch.testing.assert_close(got.out[:4], expected[:4], rtol=0, atol=1e-6)
    expected = oracle.used_output(q, k, v, tiles, got.keep, got.bias, known, SCALE)
    torch.testing.assert_close(got.out, expected, rtol=0, atol=1e-6)


def test_attended_counts_columns() -> None:
    q, k, v, tiles, _ = problem(200, 517, 1)
    forced = forced_blocks(tiles, 1, [10_000] * 2)
    epsilon = torch.full((2,), 0.99)
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=1e-3)
    )
    assert got.keep.sum().item() == 4  # the sink, twice for each head
    # 8 and 10 candidates: 64 tokens of the sink, the others' summaries, and the local triangle.
    expected = 128 * (64 + 7) + 72 * (64 + 9)
    expected += sum(517 + i - (512 if i < 128 else 640) + 1 for i in range(200))
    assert got.attended(tiles).tolist() == [expected] * 2


def test_a_key_that_is_not_a_number_poisons_what_dense_attention_poisons() -> None:
    q, k, v, tiles, _ = problem(128, 512, 1)
    k = k.clone()
    k[0, 100] = torch.nan
    forced = forced_blocks(tiles, 0, [10_000])
    got = attend_on_cpu(
        sparse_problem(q, (k, v), tiles, epsilon=torch.full((2,), 0.2), forced=forced, scale=SCALE)
    )
    assert got.out[0].isnan().all()
    assert not got.out[1].isnan().any()


@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("position", [20, 520, 660, 916])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_broken_reaches_a_query_before_it(
    dtype: torch.dtype, position: int, part: str
) -> None:
    """Not in its tile, and not through a later tile's summaries."""
    q, k, v, tiles, _ = problem(400, 517, 4, dtype)
    forced = forced_blocks(tiles, 1, [10_000] * tiles.count)
    epsilon = torch.full((2,), 0.9)
    k = k.clone()
    v = v.clone()
    for dense_above in (0.0, 2.0):  # all heads densely, and none
        backend = CpuBackend(dense_above=dense_above)
        outs = []
        for value in (0.5, torch.nan):
            (k if part == "key" else v)[1, position] = value
            asked = sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE)
            outs.append(backend.attend_sparse(asked, NoHooks()))
        clean, got = outs
        first = max(position - 517, 0)  # a key among the past ones reaches all queries
        assert torch.equal(got.out[:4], clean.out[:4])
        # Of the tile of a broken key some rows have no say any more in what it keeps.
        same = first // 128 * 128 if part == "key" and dense_above else first
        assert torch.equal(got.out[4:, :same], clean.out[4:, :same])
        assert torch.equal(got.lse[4:, :same], clean.lse[4:, :same])
        assert got.out[4:, :first].isfinite().all()
        assert got.out[4:, first:].isnan().any(-1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_query_that_is_not_a_number_poisons_itself_alone(value: float) -> None:
    q, k, v, tiles, _ = problem(200, 517, 4)
    forced = forced_blocks(tiles, 1, [10_000] * 2)
    epsilon = torch.full((2,), 0.9)
    asked = sparse_problem(q, (k, v), tiles, epsilon=epsilon, forced=forced, scale=SCALE)
    clean = attend_on_cpu(asked)
    q[2, 5, 3] = value
    got = attend_on_cpu(asked)
    poisoned = got.out.isnan().any(-1)
    assert poisoned.nonzero().tolist() == [[2, 5]]
    assert got.out[2, 5].isnan().all()
    assert got.lse[2, 5].isnan()
    assert got.lse.isfinite().sum() == got.lse.numel() - 1
    # The others' blocks are chosen by the others.
    assert torch.equal(got.keep, clean.keep)
    assert not got.keep.all()
    torch.testing.assert_close(got.out[~poisoned], clean.out[~poisoned], rtol=0, atol=1e-2)


def test_a_tile_is_whole_blocks() -> None:
    q, k, v, _, _ = problem(128, 512, 1)
    tiles = Tiles(128, 512, 96, 64)
    forced = forced_blocks(tiles, 0, [0, 0])
    asked = sparse_problem(q, (k, v), tiles, epsilon=torch.zeros(2), forced=forced, scale=SCALE)
    with pytest.raises(ValueError, match=r"tile of 96 tokens .* blocks of 64"):
        attend_on_cpu(asked)
