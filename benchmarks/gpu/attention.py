"""Block-sparse attention on this GPU: ours, torch's SDPA and FlexAttention with the same blocks.

    python -m benchmarks.gpu.attention
    TRITON_INTERPRET=1 python -m benchmarks.gpu.attention --dry-run

The dry run needs no GPU; its inputs are tiny and its times mean nothing.

First every kernel is compared with float64 on small inputs, then the last chunk of up to 16 K
queries of a prompt is timed. TFLOP/s count the (query, key) pairs of kept blocks and the causal
half of local regions; ``of peak`` is relative to the fastest dense SDPA of the run, ``select`` the
time of selection over that of selection and attention with summaries.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from prefill_kernels import (
    AttentionOptions,
    DroppedBlocks,
    Summaries,
    block_sparse_attention,
    estimate_block_loss,
    longest_first,
    select_blocks,
)
from prefill_kernels.autotune import suitable
from prefill_kernels.inputs import as_blocks
from prefill_kernels.reference import (
    block_sparse_attention_reference,
    estimate_block_loss_reference,
    select_blocks_reference,
)

from benchmarks import tables
from benchmarks.gpu.attention_problem import BACKENDS, Problem, Rows, Shape

TOKENS = (16384, 32768, 65536, 131072, 262144, 524288)
HEADS = ((28, 4), (32, 8))
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05)
FLEX_TOKENS = (16384, 131072)
"""FlexAttention compiles anew for every length."""

COLUMNS = (
    "tokens", "heads", "density", "ours_ms", "ours_tflops", "of_peak", "summaries_ms", "select_ms",
    "select_share", "flash_ms", "flash_tflops", "cudnn_ms", "cudnn_tflops", "flex_ms",
    "flex_tflops", "order_gain",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.attention")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--block", type=int, default=128, choices=(64, 128))
    parser.add_argument("--budget", type=float, default=420, help="seconds; then lengths are left")
    parser.add_argument("--output", type=Path, default=tables.RESULTS / "attention-gpu.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.dry_run:
        return dry_run()
    if not torch.cuda.is_available():
        print(
            f"gpu_attention needs a CUDA GPU; torch {torch.__version__} sees none.", file=sys.stderr
        )
        return 2
    device = torch.device("cuda")
    begin = time.monotonic()
    print(check(device, torch.bfloat16), flush=True)
    rows: list[dict[str, Any]] = []
    for tokens in sorted(options.tokens):
        for q_heads, kv_heads in HEADS:
            if time.monotonic() - begin > options.budget:
                print(f"left out for time: {tokens} tokens, {q_heads}/{kv_heads} heads")
                continue
            shape = Shape(tokens, q_heads, kv_heads, block=options.block)
            rows += measure(shape, DENSITIES, device, flex=tokens in FLEX_TOKENS)
            torch.cuda.empty_cache()
    add_peak(rows)
    settings = tables.settings(
        gpu=torch.cuda.get_device_name(),
        triton=triton.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version(),
        head_dim=128,
        block=options.block,
        dtype="bfloat16",
        seconds=round(time.monotonic() - begin, 1),
    )
    tables.write(options.output, {"settings": settings, "rows": rows})
    print(table(rows))
    return 0


def dry_run() -> int:
    """All steps but FlexAttention on the CPU."""
    if not triton.knobs.runtime.interpret:
        print("a dry run needs TRITON_INTERPRET=1 in the environment", file=sys.stderr)
        return 2
    device = torch.device("cpu")
    print(check(device, torch.float32))
    shape = Shape(192, 4, 2, head_dim=64, block=64, tile=32, chunk=96)
    rows = measure(shape, (1.0, 0.5), device, flex=False)
    add_peak(rows)
    print(table(rows))
    return 0


def check(device: torch.device, dtype: torch.dtype) -> str:
    """Attention in every configuration, paged and not, and selection, against float64.

    Raises:
        AssertionError: a difference that rounding does not explain.
    """
    shape = Shape(450, 4, 2, head_dim=128, block=128, tile=64, chunk=90)
    problem = Problem(shape, dtype, device)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    configs: list[triton.Config | None] = [None]
    if device.type == "cuda":
        tma = torch.cuda.get_device_capability()[0] >= 9
        configs += suitable(problem.q, shape.head_dim, shape.block, tma)
    _check_attention(problem, configs, tolerance)
    _check_selection(problem)
    return (
        f"correct: attention in {len(configs)} configurations, contiguous and paged, within "
        f"{tolerance} of float64; selection equal to its reference"
    )


def _rounded(problem: Problem) -> Summaries:
    """The summaries as the kernels round them."""
    dtype = problem.q.dtype
    exact = problem.summaries
    return exact._replace(
        k_mean=exact.k_mean.to(dtype).float(),
        v_mean=exact.v_mean.to(dtype).float(),
        k_far=exact.k_far.to(dtype).float(),
    )


def _check_attention(
    problem: Problem, configs: list[triton.Config | None], tolerance: float
) -> None:
    shape = problem.shape
    device = problem.device
    rows = problem.rows(0.5)
    summaries = _rounded(problem)
    bias = torch.randn(rows.keep.shape, device=device).masked_fill(rows.keep, -torch.inf)
    dropped = DroppedBlocks(summaries.k_mean, summaries.v_mean, bias)
    tiling = shape.tiling()
    expected = block_sparse_attention_reference(
        problem.q, problem.k, problem.v, rows.csr, tiling=tiling, dropped=dropped
    )
    blocks = -(-shape.tokens // shape.block)
    table = torch.randperm(blocks, device=device).to(torch.int32)
    k_pages, v_pages = (_paged(x, table, shape.block) for x in (problem.k, problem.v))
    for k, v, used in (
        (problem.k, problem.v, tiling),
        (k_pages, v_pages, replace(tiling, block_table=table)),
    ):
        for config in configs:
            options = AttentionOptions(config=config)
            got = block_sparse_attention(
                problem.q, k, v, rows.csr, tiling=used, dropped=dropped, options=options
            )
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


def _check_selection(problem: Problem) -> None:
    shape = problem.shape
    device = problem.device
    tiling = shape.tiling()
    summaries = _rounded(problem)
    loss, peak, lift = estimate_block_loss(problem.q, problem.k, summaries, tiling=tiling)
    on_cpu = Summaries(*(x.cpu() for x in summaries))
    expected = estimate_block_loss_reference(
        problem.q.cpu(), problem.k.cpu(), on_cpu, tiling=tiling
    )
    torch.testing.assert_close(loss.cpu().double(), expected.loss, atol=1e-4, rtol=5e-2)
    torch.testing.assert_close(peak.cpu().double(), expected.peak, atol=1e-4, rtol=5e-2)
    torch.testing.assert_close(lift.cpu().double(), expected.bias, atol=1e-3, rtol=1e-3)
    forced = torch.zeros(loss.shape[1:], dtype=torch.bool, device=device)
    epsilon = torch.full((shape.kv_heads,), float(loss.sum(-1).mean()) / 2, device=device)
    csr, _ = select_blocks(loss, lift, forced, epsilon)
    keep, _ = select_blocks_reference(loss.cpu(), lift.cpu(), forced.cpu(), epsilon.cpu())
    torch.testing.assert_close(csr.col[: csr.row_ptr[-1]].cpu().long(), keep.nonzero()[:, -1])


def _paged(x: torch.Tensor, table: torch.Tensor, block: int) -> torch.Tensor:
    """Blocks of [kv_heads, keys, d] on the pages that the table names, the last one NaN-filled."""
    kv_heads, keys, head_dim = x.shape
    pages = x.new_full((len(table), block, kv_heads, head_dim), torch.nan)
    whole = keys // block
    pages[table[:whole].long()] = as_blocks(x, block, False).transpose(1, 2)
    if keys % block:
        pages[int(table[whole]), : keys % block] = x[:, whole * block :].transpose(0, 1)
    return pages


def measure(
    shape: Shape, densities: Iterable[float], device: torch.device, flex: bool
) -> list[dict[str, Any]]:
    """One row per density. What a contestant cannot do is None, and said."""
    problem = Problem(shape, torch.float32 if device.type == "cpu" else torch.bfloat16, device)
    name = f"{shape.q_heads}/{shape.kv_heads}"
    common: dict[str, Any] = {"tokens": shape.tokens, "heads": name}
    for backend in BACKENDS:
        call, pairs = problem.dense(backend)
        common |= _timed(backend, call, shape.flops(pairs), device)
        del call
    common["select_ms"] = 1e3 * seconds(problem.selection(), device)
    contestant = _Flex(problem) if flex else None
    found = []
    for density in densities:
        rows = problem.rows(density)
        flops = shape.flops(rows.kept_pairs)
        row = {**common, "density": density, **_timed("ours", problem.ours(rows), flops, device)}
        order = AttentionOptions(order=longest_first(rows.csr))
        ordered = problem.ours(rows, options=order)
        row["order_gain"] = row["ours_ms"] / (1e3 * seconds(ordered, device))
        row["summaries_ms"] = 1e3 * seconds(problem.compensated(rows), device)
        row["select_share"] = row["select_ms"] / (row["select_ms"] + row["summaries_ms"])
        if contestant is not None:
            row |= _timed("flex", contestant.call(rows), flops, device)
        found.append(row)
        print({key: row[key] for key in COLUMNS if row.get(key) is not None}, flush=True)
    return found


class _Flex:
    """FlexAttention: kept blocks are full blocks, local regions partial ones."""

    def __init__(self, problem: Problem) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self._problem = problem
        torch.compiler.reset()
        self._attend: Any = torch.compile(flex_attention, dynamic=False)

    def call(self, rows: Rows) -> Callable[[], torch.Tensor]:
        from torch.nn.attention.flex_attention import BlockMask

        problem = self._problem
        shape = self._problem.shape
        offset = shape.q_offset

        def causal(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            return query + offset >= key

        full = rows.keep.repeat_interleave(shape.q_heads // shape.kv_heads, 0)[None]
        first = shape.candidates().to(problem.device)[:, None]
        width = -(-shape.tile // shape.block)
        block = torch.arange(full.shape[-1], device=problem.device)
        local = ((block >= first) & (block < first + width)).expand(full.shape)
        mask = BlockMask.from_kv_blocks(
            *_lists(local),
            *_lists(full),
            BLOCK_SIZE=(shape.tile, shape.block),
            mask_mod=causal,
            seq_lengths=(shape.queries, shape.tokens),
            compute_q_blocks=False,
        )
        q, k, v = (x[None] for x in (problem.q, problem.k, problem.v))
        scale = shape.head_dim**-0.5
        return lambda: self._attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)


def _lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and indices, chosen ones first, of a bool mask [..., blocks]."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _timed(
    name: str, call: Callable[[], object], flops: int, device: torch.device
) -> dict[str, float | None]:
    try:
        taken = seconds(call, device)
    except Exception as error:  # a contestant's limits are a result, too
        if name == "ours":
            raise
        print(f"{name} cannot: {type(error).__name__}: {str(error).splitlines()[0]}")
        return {f"{name}_ms": None, f"{name}_tflops": None}
    return {f"{name}_ms": 1e3 * taken, f"{name}_tflops": flops / taken / 1e12}


def seconds(call: Callable[[], object], device: torch.device, enough: float = 0.3) -> float:
    """Median of 3 to 20 calls after one that warms up (and tunes); at most about ``enough`` s."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    call()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < enough and len(taken) < 20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return median(taken)


def add_peak(rows: list[dict[str, Any]]) -> None:
    """``of_peak``: our rate over that of the fastest dense SDPA."""
    rates = [row[f"{name}_tflops"] for row in rows for name in BACKENDS]
    peak = max((rate for rate in rates if rate), default=None)
    for row in rows:
        row["of_peak"] = row["ours_tflops"] / peak if peak else None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    return tables.markdown(COLUMNS, [[row.get(column) for column in COLUMNS] for row in rows])


if __name__ == "__main__":
    sys.exit(main())
