"""Estimated losses in the interpreter, against their naive reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prefill_kernels.block_loss import estimate_loss, estimate_loss_reference
from prefill_kernels.block_sparse_attention import block_sparse_reference
from prefill_kernels.block_summaries import block_summaries_reference
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.sparse.selection import estimate
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles
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
    loss, peak, bias = interpret("loss.estimate_loss", *args, **options)
    expected_loss, expected_peak, expected_bias = estimate_loss_reference(*args, **options)
    torch.testing.assert_close(bias.double(), expected_bias, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.double(), expected_loss, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(peak.double(), expected_peak, atol=1e-7, rtol=1e-4)
    assert ((loss > 0) == (bias != -torch.inf)).all()
    assert (2 * peak >= loss).all()


def test_estimate_through_a_block_table(interpret: Interpreter) -> None:
    (q, k, *summaries), options = inputs(queries=7, q_offset=153)
    plain = interpret("loss.estimate_loss", q, k, *summaries, **options)
    pages = torch.full((20, 16, 2, 64), torch.nan)
    table = torch.randperm(20)[:10].to(torch.int32)
    for j, page in enumerate(table):
        pages[page] = k[:, 16 * j : 16 * j + 16].transpose(0, 1)
    paged = interpret("loss.estimate_loss", q, pages, *summaries, block_table=table, **options)
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
    loss, *_ = interpret("loss.estimate_loss", q, k, k_mean, k_var, *far, **options)
    assert (loss[:, :, :10].argmax(-1) == 4).all()
    assert (loss[:, :, 4] > 0.5).all()


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
    found = estimate(tiles.pack(q, 2), local, known, tiles=tiles, scale=options["scale"])
    loss, peak, bias = estimate_loss_reference(q, k, k_mean, k_var, *far, **options)
    torch.testing.assert_close(found.loss.double(), loss[..., : tiles.blocks], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.peak.double(), peak[..., : tiles.blocks], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.bias.double(), bias[..., : tiles.blocks], atol=1e-5, rtol=1e-5)


def test_bad_input_is_named() -> None:
    (q, k, *summaries), options = inputs()
    with pytest.raises(ValueError, match="summaries of 8 blocks do not reach"):
        estimate_loss(q, k, *(x[:, :8] for x in summaries), **options)
    with pytest.raises(ValueError, match="tile_tokens = 30 is no multiple of 4"):
        estimate_loss(q, k, *summaries, **{**options, "tile_tokens": 30})
