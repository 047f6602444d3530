"""Estimate and selection in the interpreter, against their naive references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prefill_service.attention.block_sparse import GatherBuffers
from prefill_service.attention.selection import estimate, select
from prefill_service.attention.sparse import forced_blocks, sparse_attention
from prefill_service.attention.summaries import BlockSummaries, summarize
from prefill_service.attention.tiles import Tiles
from prefill_service.kernels.block_sparse import block_sparse_reference
from prefill_service.kernels.block_summaries import block_summaries_reference
from prefill_service.kernels.csr import BlockCSR
from prefill_service.kernels.selection import (
    estimate_loss,
    estimate_loss_reference,
    select_blocks,
    select_reference,
)
from tests.kernels.interpreter import Interpreter


def inputs(
    *,
    group: int = 4,
    queries: int = 70,
    q_offset: int = 90,
    head_dim: int = 64,
    block: int = 16,
    tile: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Keys in clusters of a few blocks with an outlier here and there, so that losses differ."""
    torch.manual_seed(seed)
    keys = q_offset + queries
    centre = torch.randn(2, keys // 48 + 1, head_dim).repeat_interleave(48, 1)[:, :keys]
    k = centre + torch.rand(2, keys, 1) * torch.randn(2, keys, head_dim)
    k[:, ::61] *= 3
    q = torch.randn(2 * group, queries, head_dim).to(dtype)
    k = k.to(dtype)
    k_mean, k_var, _, k_far, far_count = block_summaries_reference(k, k, block_tokens=block)
    # Rounded as the kernel will round them.
    k_mean, k_far = (x.to(dtype).float() for x in (k_mean, k_far))
    options = {
        "block_tokens": block,
        "tile_tokens": tile,
        "q_offset": q_offset,
        "scale": head_dim**-0.5,
    }
    return (q, k, k_mean, k_var.float(), k_far, far_count.float()), options


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group": 7, "head_dim": 80, "dtype": torch.float16, "tile": 48},
        {"group": 1, "head_dim": 128, "dtype": torch.bfloat16, "q_offset": 333, "queries": 33},
        {"queries": 1, "q_offset": 200},
        {"queries": 30, "q_offset": 5, "tile": 128},
        {"tile": 40, "head_dim": 96, "q_offset": 37},
    ],
    ids=str,
)
def test_estimate_equals_float64(interpret: Interpreter, changes: dict[str, Any]) -> None:
    args, options = inputs(**changes)
    loss, peak, bias = interpret("selection.estimate_loss", *args, **options)
    expected_loss, expected_peak, expected_bias = estimate_loss_reference(*args, **options)
    torch.testing.assert_close(bias.double(), expected_bias, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(peak.double(), expected_peak, atol=1e-7, rtol=1e-4)
    assert ((loss > 0) == (bias != -torch.inf)).all()
    assert (2 * peak >= loss).all()


def test_estimate_through_a_block_table(interpret: Interpreter) -> None:
    (q, k, *summaries), options = inputs(queries=7, q_offset=153)
    plain = interpret("selection.estimate_loss", q, k, *summaries, **options)
    pages = torch.full((20, 16, 2, 64), torch.nan)
    table = torch.randperm(20)[:10].to(torch.int32)
    for j, page in enumerate(table):
        pages[page] = k[:, 16 * j : 16 * j + 16].transpose(0, 1)
    paged = interpret("selection.estimate_loss", q, pages, *summaries, block_table=table, **options)
    assert all(map(torch.equal, plain, paged))


def test_estimate_finds_the_needle(interpret: Interpreter) -> None:
    """One key that the queries look for, in a block whose mean does not show it."""
    (q, k, *_), options = inputs(q_offset=160, queries=32)
    k *= 0.3
    q[:] = torch.randn(64)
    k[:, 70] = q[0, 0] * 2
    k[:, 64:70] -= k[:, 70:71] / 15
    k[:, 71:80] -= k[:, 70:71] / 15
    k_mean, k_var, _, *far = (x.float() for x in block_summaries_reference(k, k, block_tokens=16))
    loss, *_ = interpret("selection.estimate_loss", q, k, k_mean, k_var, *far, **options)
    assert (loss[:, :, :10].argmax(-1) == 4).all()
    assert (loss[:, :, 4] > 0.5).all()


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


@pytest.mark.parametrize(
    ("tile", "queries", "q_offset"),
    [(32, 70, 333), (48, 70, 333), (32, 33, 320), (16, 1, 203), (128, 99, 130)],
)
def test_the_reference_is_what_the_cpu_estimates(tile: int, queries: int, q_offset: int) -> None:
    (q, k, k_mean, k_var, *far), options = inputs(tile=tile, queries=queries, q_offset=q_offset)
    tiles = Tiles(q.shape[1], options["q_offset"], tile, options["block_tokens"])
    none = BlockCSR(torch.zeros(2 * tiles.count + 1, dtype=torch.int32), torch.zeros(0))
    _, lse = block_sparse_reference(q, k, k, none, **options)
    local = tiles.pack(lse[..., None].float(), 2)[..., 0]
    known = BlockSummaries(k_mean, k_var, k_mean, *far).first(tiles.blocks)
    found = estimate(tiles.pack(q, 2), local, tiles, known, options["scale"])
    loss, peak, bias = estimate_loss_reference(q, k, k_mean, k_var, *far, **options)
    torch.testing.assert_close(found.loss.double(), loss[..., : tiles.blocks], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.peak.double(), peak[..., : tiles.blocks], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.bias.double(), bias[..., : tiles.blocks], atol=1e-5, rtol=1e-5)


def test_both_back_ends_attend_alike(interpret: Interpreter) -> None:
    """What a GPU computes is what a CPU computes, from the queries to the attention output."""
    (q, k, *_), options = inputs(group=2, q_offset=653, queries=82, seed=3)
    v = torch.randn_like(k)
    tiles = Tiles(q.shape[1], options["q_offset"], options["tile_tokens"], options["block_tokens"])
    known = summarize(k[:, : tiles.blocks * 16], v[:, : tiles.blocks * 16], 16)
    forced = forced_blocks(tiles, 1, [620, 652, 684])
    given, epsilon = (q, k, v, known, tiles), torch.tensor([0.3, 0.4])
    rest = forced, options["scale"]
    a = interpret(
        "prefill_service.attention.sparse._with_kernels", *given, epsilon, epsilon / 2, *rest
    )
    # Of CPU tensors: the other back end.
    b = sparse_attention(*given, epsilon, *rest, GatherBuffers(), row_limit=epsilon / 2)
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
    known = summarize(k[:, : tiles.blocks * 16], k[:, : tiles.blocks * 16], 16)
    forced = forced_blocks(tiles, 1, [304, 336])
    given, epsilon = (q, k, k, known, tiles), torch.tensor([0.4, 0.4])
    rest = forced, options["scale"]
    a = interpret(
        "prefill_service.attention.sparse._with_kernels", *given, epsilon, epsilon / 2, *rest
    )
    b = sparse_attention(*given, epsilon, *rest, GatherBuffers(), row_limit=epsilon / 2)
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
    loss, _, bias = interpret("selection.estimate_loss", q, k, k_mean, k_var, *far, **options)
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
    (q, k, *summaries), options = inputs()
    with pytest.raises(ValueError, match="summaries of 8 blocks do not reach"):
        estimate_loss(q, k, *(x[:, :8] for x in summaries), **options)
    with pytest.raises(ValueError, match="tile_tokens = 30 is no multiple of 4"):
        estimate_loss(q, k, *summaries, **{**options, "tile_tokens": 30})
