"""Block-sparse attention in the interpreter, against float64 attention over the same keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
from kernel_interpreter import Interpreter
from prefill_kernels import (
    AttentionOptions,
    BlockCSR,
    DroppedBlocks,
    Tiling,
    block_attention,
    block_sparse_attention,
    block_sparse_lse,
    longest_first,
)
from prefill_kernels.reference import block_sparse_attention_reference
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
TMA = triton.Config({"BLOCK_M": 64, "BLOCK_N": 64, "TMA": True})


@dataclass
class Case:
    """Random inputs. Keys behind the last query are NaN; unused capacity names no block."""

    kv_heads: int = 2
    group: int = 4
    queries: int = 70
    q_offset: int = 90
    head_dim: int = 64
    block: int = 16
    tile: int = 32
    density: float = 0.5
    dtype: torch.dtype = torch.float32
    summarised: bool = False
    paged: bool = False
    seed: int = 0

    def build(self) -> tuple[tuple[Tensor, Tensor, Tensor, BlockCSR], dict[str, Any]]:
        torch.manual_seed(self.seed)
        keys = self.q_offset + self.queries
        blocks = keys // self.block + 1
        q = torch.randn(self.kv_heads * self.group, self.queries, self.head_dim).to(self.dtype)
        kv = torch.randn(keys + 3, 2, self.kv_heads, self.head_dim).to(self.dtype)
        kv[keys:] = torch.nan
        k = kv[:, 0].transpose(0, 1)
        v = kv[:, 1].transpose(0, 1)
        csr, bias = self.rows(blocks)
        options: dict[str, Any] = {"tiling": self.tiling}
        if self.summarised:
            shape = (self.kv_heads, blocks, self.head_dim)
            k_mean, v_mean = (torch.randn(shape).to(self.dtype).float() for _ in range(2))
            options["dropped"] = DroppedBlocks(k_mean, v_mean, bias)
        if self.paged:
            k, v, table = self.pages(k, v, blocks)
            options["tiling"] = replace(self.tiling, block_table=table)
        return (q, k, v, csr), options

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.block, self.tile, self.q_offset)

    def rows(self, blocks: int) -> tuple[BlockCSR, Tensor]:
        tiles = -(-self.queries // self.tile)
        bias = torch.full((self.kv_heads, tiles, blocks), torch.nan)
        row_ptr = [0]
        col = []
        for h in range(self.kv_heads):
            for t in range(tiles):
                candidates = (self.q_offset + t * self.tile) // self.block
                kept = torch.rand(candidates) < self.density
                col += kept.nonzero().flatten().tolist()
                row_ptr.append(len(col))
                bias[h, t, :candidates] = torch.randn(candidates).masked_fill(kept, -torch.inf)
        capacity = [2**31 - 1] * 3
        return BlockCSR(
            torch.tensor(row_ptr, dtype=torch.int32), torch.tensor(col + capacity).to(torch.int32)
        ), bias

    def pages(self, k: Tensor, v: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every KV head's blocks on pages of their own, in random order."""
        count = 2 * self.kv_heads * blocks
        table = torch.randperm(count)[: self.kv_heads * blocks].view(self.kv_heads, blocks)
        pages = torch.full((2, count, self.block, self.kv_heads, self.head_dim), torch.nan)
        pages = pages.to(k.dtype)
        for paged, x in zip(pages, (k, v), strict=True):
            for h in range(self.kv_heads):
                for j, rows in enumerate(x[h].split(self.block)):
                    paged[table[h, j], : len(rows), h] = rows
        return pages[0], pages[1], table.to(torch.int32)


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    assert got[0].dtype == dtype
    torch.testing.assert_close(got[0].double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1].double(), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(group=1, head_dim=128, dtype=torch.float16, summarised=True),
        Case(group=7, queries=40, head_dim=80, dtype=torch.bfloat16, paged=True),
        Case(group=7, head_dim=96, q_offset=37, tile=16, queries=33, summarised=True, paged=True),
        Case(head_dim=256, kv_heads=1, dtype=torch.float16, block=32, tile=24, summarised=True),
        Case(group=3, queries=1, q_offset=200, summarised=True, dtype=torch.bfloat16),
        Case(queries=1, q_offset=0),
        Case(group=2, q_offset=0, tile=128, queries=100),
        Case(density=0.0, q_offset=160),
        Case(density=1.0, q_offset=150, dtype=torch.float16, block=64, tile=16, paged=True),
        Case(density=0.1, q_offset=333, tile=40, summarised=True),
    ],
    ids=str,
)
def test_equals_float64(interpret: Interpreter, case: Case) -> None:
    args, options = case.build()
    got = interpret(block_sparse_attention, *args, **options)
    check(got, block_sparse_attention_reference(*args, **options), case.dtype)


@pytest.mark.parametrize("paged", [False, True])
def test_blocks_through_tensor_descriptors(interpret: Interpreter, paged: bool) -> None:
    """The path of Hopper's tensor memory accelerator, one and two steps to a block."""
    for block in (64, 128):
        case = Case(
            block=block, queries=40, q_offset=400, dtype=torch.float16, summarised=True, paged=paged
        )
        args, options = case.build()
        got = interpret(
            block_sparse_attention, *args, options=AttentionOptions(config=TMA), **options
        )
        check(got, block_sparse_attention_reference(*args, **options), case.dtype)


def test_reference_of_all_blocks_is_causal_attention() -> None:
    args, options = Case(density=1.0, q_offset=40).build()
    q, k, v, _ = args
    keys = 40 + q.shape[1]
    k, v = (x[:, :keys].double().repeat_interleave(4, 0) for x in (k, v))
    mask = torch.ones(q.shape[1], keys).tril(40).bool()
    scale = q.shape[2] ** -0.5
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k, v, attn_mask=mask, scale=scale
    )
    scores = (q.double() @ k.transpose(1, 2) * scale).masked_fill(~mask, -torch.inf)
    out, lse = block_sparse_attention_reference(*args, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_rows_without_keys(interpret: Interpreter) -> None:
    """Without the local region an empty CSR row leaves nothing to attend to."""
    case = Case(density=0.15, tile=16, dtype=torch.float16)
    args, options = case.build()
    without = AttentionOptions(local=False)
    out, lse = interpret(block_sparse_attention, *args, options=without, **options)
    check((out, lse), block_sparse_attention_reference(*args, local=False, **options), case.dtype)
    empty = lse == -torch.inf
    assert empty.any()
    assert not empty.all()
    assert (out[empty] == 0).all()


def test_scores_of_minus_infinity(interpret: Interpreter) -> None:
    """Key tiles at the start, then all of a row's keys, with scores of -inf: never NaN."""
    case = Case(density=1.0, q_offset=64, queries=32)
    (q, k, v, csr), options = case.build()
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, 64:80, 0] = -torch.inf  # the local region's first tile
    k[:, :16, 0] = -torch.inf
    k[1, :, 0] = -torch.inf
    out, lse = interpret(block_sparse_attention, q, k, v, csr, **options)
    expected = block_sparse_attention_reference(q, k, v, csr, **options)
    check((out, lse), expected, case.dtype)
    assert (lse[4:] == -torch.inf).all()
    assert (out[4:] == 0).all()
    assert lse[:4].isfinite().all()


def test_nan_stays_where_it_is_attended(interpret: Interpreter) -> None:
    case = Case(density=0.5, queries=40, tile=16, summarised=True)
    (q, k, v, csr), options = case.build()
    kept = csr.col[csr.row_ptr[0] : csr.row_ptr[1]].tolist()
    dropped = next(j for j in range(90 // 16) if j not in kept)
    clean, _ = interpret(block_sparse_attention, q, k, v, csr, **options)
    k[0, dropped * 16 : dropped * 16 + 16] = torch.nan
    v[0, dropped * 16 : dropped * 16 + 16] = torch.nan
    q[1, 3] = torch.nan
    out, _ = interpret(block_sparse_attention, q, k, v, csr, **options)
    assert out[1, 3].isnan().all()
    out[1, 3] = clean[1, 3]
    assert torch.equal(out[:4, :16], clean[:4, :16])  # tile 0 of KV head 0 dropped that block
    assert torch.equal(out[4:], clean[4:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_broken_value_reaches_the_rows_that_see_it(
    interpret: Interpreter, dtype: torch.dtype, value: float
) -> None:
    """Neither rows before it in its tile nor other heads and earlier tiles."""
    case = Case(density=0.5, queries=40, tile=16, group=2, summarised=True, dtype=dtype)
    (q, k, v, csr), options = case.build()
    clean, clean_lse = interpret(block_sparse_attention, q, k, v, csr, **options)
    v[0, 90 + 21, 5] = value  # in the second tile
    args = q, k, v, csr
    out, lse = interpret(block_sparse_attention, *args, **options)
    broken = ~out.isfinite()
    wanted = torch.zeros_like(broken)
    wanted[:2, 21:32] = True  # the third tile has that block as a candidate
    assert torch.equal(broken[:, :32], wanted[:, :32])
    assert not broken[2:].any()
    assert torch.equal(out[~broken], clean[~broken])
    assert torch.equal(lse.isnan(), wanted.any(-1))
    assert torch.equal(lse[~lse.isnan()], clean_lse[~lse.isnan()])
    expected, expected_lse = block_sparse_attention_reference(*args, **options)
    assert torch.equal(expected.isfinite(), ~broken)
    assert torch.equal(expected_lse.isfinite(), lse.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_key_reaches_no_row_before_it(interpret: Interpreter, value: float) -> None:
    case = Case(density=0.5, queries=32, tile=32, group=2)
    (q, k, v, csr), options = case.build()
    clean, _ = interpret(block_sparse_attention, q, k, v, csr, **options)
    k[0, 90 + 21] = value
    out, lse = interpret(block_sparse_attention, q, k, v, csr, **options)
    assert torch.equal(out[:, :21], clean[:, :21])
    assert torch.equal(out[2:], clean[2:])
    assert out[:2, 21:].isnan().all()
    assert lse[:2, 21:].isnan().all()
    expected, _ = block_sparse_attention_reference(q, k, v, csr, **options)
    assert torch.equal(expected.isfinite(), out.isfinite())


def test_skip_leaves_out_what_is_negligible(interpret: Interpreter) -> None:
    """NaN values prove that the softmax of a skipped tile never happened."""
    case = Case(density=1.0, q_offset=96, queries=16, tile=16, group=2)
    (q, k, v, csr), options = case.build()
    q[..., 0] = 8.0
    k[:, :, 0] = 0.0
    k[:, 32:64, 0] = -20.0  # logits about 20 below the others
    expected = block_sparse_attention_reference(q, k, v, csr, **options)
    v[:, 32:64] = torch.nan
    skipping = interpret(
        block_sparse_attention,
        q,
        k,
        v,
        csr,
        options=AttentionOptions(skip_threshold=1e-4),
        **options,
    )
    check(skipping, expected, case.dtype)
    careful = interpret(
        block_sparse_attention,
        q,
        k,
        v,
        csr,
        options=AttentionOptions(skip_threshold=1e-12),
        **options,
    )
    assert careful[0].isnan().all()


def test_order_of_rows_changes_nothing(interpret: Interpreter) -> None:
    args, options = Case(dtype=torch.float16, queries=40, tile=16).build()
    csr = args[3]
    order = longest_first(csr)
    lengths = csr.row_ptr.diff()[order]
    assert (lengths.diff() <= 0).all()
    assert sorted(order.tolist()) == list(range(len(order)))
    plain = interpret(block_sparse_attention, *args, **options)
    ordered = interpret(
        block_sparse_attention, *args, options=AttentionOptions(order=order), **options
    )
    assert all(map(torch.equal, plain, ordered))


def test_the_log_sum_exp_alone(interpret: Interpreter) -> None:
    args, options = Case(dtype=torch.float16, queries=40, tile=16).build()
    q, k, _, csr = args
    _, lse = interpret(block_sparse_attention, *args, **options)
    assert torch.equal(interpret(block_sparse_lse, q, k, csr, **options), lse)


def test_what_was_tuned_with_tensor_descriptors_is_not_used_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = block_attention._tuned_kernel.keys
    launched: list[tuple[Any, ...]] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: launched.append(tuple(arguments[key] for key in keys))

    monkeypatch.setattr(block_attention, "_tuned_kernel", Recorder())
    length = 8192
    queries = torch.zeros(2, 64, 64).half()
    aligned = torch.zeros(2, length, 64).half()
    shifted = torch.zeros(2 * length * 64 + 1).half()[1:].view(2, length, 64)  # by two bytes
    none = BlockCSR(torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    for k in (aligned, shifted):
        block_sparse_attention(queries, k, aligned, none, tiling=Tiling(64, 128, length - 64))
    assert len(launched) == 2
    assert launched[0] != launched[1]


def test_no_queries() -> None:
    args, options = Case(queries=0, tile=16).build()
    out, lse = block_sparse_attention(*args, **options)
    assert out.shape == (8, 0, 64)
    assert lse.shape == (8, 0)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        ({"block_tokens": 24}, "block_tokens = 24 is not a power of two"),
        ({"q_offset": -1}, "q_offset = -1 >= 0"),
        ({"q_offset": 100}, "163 keys are fewer than the 170 up to the last query"),
        ({"tile_tokens": 70}, "row_ptr has 7 entries, expected 3"),
    ],
)
def test_a_bad_tiling_is_named(tiling: dict[str, int], message: str) -> None:
    case = Case()
    args, _ = case.build()
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*args, tiling=replace(case.tiling, **tiling))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, r"scale = -1\.0 is not accepted"),
        ({"skip_threshold": 1.5}, r"skip_threshold = 1\.5"),
        ({"order": torch.arange(6)}, r"order is torch\.int64 \[6\], expected int32 \[6\]"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], message: str) -> None:
    case = Case()
    args, _ = case.build()
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*args, tiling=case.tiling, options=AttentionOptions(**options))


def test_too_few_summaries_are_named() -> None:
    case = Case()
    args, _ = case.build()
    means = torch.zeros(2, 8, 64)
    dropped = DroppedBlocks(means, means, torch.zeros(2, 3, 8))
    message = "bias and summaries of 8 blocks do not reach the 9 before the last tile"
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*args, tiling=case.tiling, dropped=dropped)
