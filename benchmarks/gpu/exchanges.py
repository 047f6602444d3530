"""Sequence parallelism on this machine: every exchange, and whole rank groups, against one rank.

    python -m benchmarks.gpu.exchanges
    python -m benchmarks.gpu.exchanges --device cpu

On one GPU two to four ranks share it, and what they exchange goes through the host; with two GPUs
or more, NCCL connects up to four ranks as well. Attention through each exchange is compared with
dense float64 attention, and the bytes that each rank's meter counts with the cost model's formulas,
rank by rank (not of `demand`, whose bytes depend on what is selected). A rank group then prefills a
video with a tiny random checkpoint (Qwen3-VL's and Qwen2.5-VL's architecture), and its KV is
compared with that of a group of one rank. The last thing printed is the table; the exit status is 1
if a row of it failed, 2 without the device.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.parallel.problem import DENSE, Problem, Run, run_exchanges
from benchmarks.parallel.ranks import Transport, run_ranks, transports
from prefill_service.parallel.exchanges.catalog import EXCHANGES, GATHER, ExchangeKind

COLUMNS = (
    "what", "transport", "ranks", "exchange", "dtype", "error", "limit", "bytes", "formula",
    "seconds", "ok",
)  # fmt: skip
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the largest difference from float64's x, over 1 + |x|."""
GROUP_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the difference's norm over the norm: layer after layer, rounding differs, and adds up."""
FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl")


def problems(factor: int) -> dict[str, Problem]:
    """Real head counts on uneven patches in several chunks; a prompt with less than a rank each."""
    uneven = tuple(5 + 29 * factor * (i + 1) for i in range(19))
    even = tuple(32 * factor * (i + 1) for i in range(16))
    return {
        "28/4 heads, uneven chunks": Problem(
            patch_ends=uneven, chunk=100 * factor, q_heads=28, kv_heads=4, head_dim=128
        ),
        "32/8 heads, one chunk": Problem(
            patch_ends=even, chunk=1 << 20, q_heads=32, kv_heads=8, head_dim=128
        ),
        "8/4 heads, one patch": Problem(
            patch_ends=(21,), chunk=64, q_heads=8, kv_heads=4, head_dim=64
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if anything differs, 2 without the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.exchanges")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="short prompts, one family, float32")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.exchanges needs a CUDA GPU (or --device cpu); "
            f"torch {torch.__version__} sees none",
            file=sys.stderr,
        )
        return 2
    os.environ.setdefault("PREFILL_LOG_LEVEL", "WARNING")  # of the rank groups' processes
    begin = time.monotonic()
    dtypes = [torch.float32] if options.small else list(LIMITS)
    rows: list[dict[str, Any]] = []
    for transport in transports(options.device):
        for ranks in [2] if options.small else rank_counts(transport):
            rows += check_exchanges(
                transport, ranks, problems(1 if options.small else 3), dtypes=dtypes
            )
            print(f"{transport.name}, {ranks} ranks: exchanges compared", flush=True)
    families = FAMILIES[:1] if options.small else FAMILIES
    if importlib.util.find_spec("av") is None:
        print("rank groups left out: they read a video, and PyAV is not installed")
        families = ()
    # On several GPUs two ranks of a group are connected by NCCL, as in the service.
    for family in families:
        for dtype in dtypes:
            rows += check_group(
                family, options.device, 2, dtype=dtype, seconds=4.0 if options.small else 12.0
            )
            print(f"{family}, {dtype}: rank group compared", flush=True)
    failed = sum(not row["ok"] for row in rows)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"\n{name}, torch {torch.__version__}, {time.monotonic() - begin:.0f} s")
    print(f"{len(rows)} checks, {failed} failed; bytes are of all ranks and layers\n")
    print(tables.markdown(COLUMNS, [[cell(row.get(name)) for name in COLUMNS] for row in rows]))
    return 1 if failed else 0


def rank_counts(transport: Transport) -> list[int]:
    """How many ranks to connect by it."""
    return [2, 3, 4] if transport.staged or transport.gpus >= 4 else [2]


def check_exchanges(
    transport: Transport,
    ranks: int,
    cases: dict[str, Problem],
    *,
    dtypes: Iterable[torch.dtype],
    kinds: Sequence[ExchangeKind] = EXCHANGES,
) -> list[dict[str, Any]]:
    """A row for each case, exchange and precision."""
    jobs = [
        (name, problem, kind, dtype)
        for name, problem in cases.items()
        for dtype in dtypes
        for kind in kinds
    ]
    work = [(problem, kind, dtype) for _, problem, kind, dtype in jobs]
    of_ranks = run_ranks(run_exchanges, ranks, transport, work)
    rows = []
    for job, runs in zip(jobs, zip(*of_ranks, strict=True), strict=True):
        name, problem, kind, dtype = job
        rows.append(
            {
                "what": name,
                "transport": transport.name,
                "ranks": ranks,
                "exchange": str(kind),
                "dtype": dtype,
                **compare(
                    problem,
                    kind,
                    dtype,
                    runs=runs,
                    wanted=_wanted(problem, dtype, transport.device),
                ),
            }
        )
    return rows


@cache
def _wanted(problem: Problem, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[layers, q_heads, tokens, head_dim] in float64, on the host."""
    layers = range(problem.layers)
    return torch.stack([problem.dense(i, dtype, torch.device(device)).cpu() for i in layers])


def compare(
    problem: Problem,
    kind: ExchangeKind,
    dtype: torch.dtype,
    *,
    runs: Sequence[Run],
    wanted: torch.Tensor,
) -> dict[str, Any]:
    """Error and bytes of one run of all ranks."""
    errors = []
    for run in runs:
        exact = wanted[:, :, run.tokens]
        errors.append(((run.out.double() - exact).abs() / (1 + exact.abs())).flatten())
    error = float(torch.cat(errors).max())
    covered = torch.cat([run.tokens for run in runs]).sort().values
    whole = torch.equal(covered, torch.arange(problem.tokens))
    received = [run.received for run in runs]
    formula = None
    if kind in DENSE:
        formula = (problem.layers * problem.predicted(kind, len(runs), dtype).received).tolist()
    right = formula in (None, received)  # rank by rank
    return {
        "error": error,
        "limit": LIMITS[dtype],
        "bytes": sum(received),
        "formula": None if formula is None else sum(formula),
        "seconds": max(run.seconds for run in runs),
        # Not `error > limit`: NaN is not within it.
        "ok": whole and right and error <= LIMITS[dtype],
    }


def check_group(
    family: str,
    device: str,
    ranks: int,
    *,
    dtype: torch.dtype,
    seconds: float,
    kinds: Sequence[ExchangeKind] = EXCHANGES,
) -> list[dict[str, Any]]:
    """A row for each exchange: the KV of a video on ``ranks`` ranks, and on one."""
    # Not above: spawned ranks import this module, and need none of these.
    from benchmarks.parallel.group import NEVER, Case, Prefix, prefill_video
    from prefill_service.config import EngineConfig
    from tools.make_tiny_checkpoint import build
    from tools.make_video import write_video

    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="sp-") as made:
        folder = Path(made)
        model = build(family, folder / "model")
        video = write_video(folder / "video.mp4", seconds=seconds, fps=10, width=160, height=120)

        def prefill(count: int, exchanges: Sequence[ExchangeKind]) -> list[Prefix]:
            cases = [Case(kind) for kind in exchanges]
            config = EngineConfig(
                model=str(model),
                ranks=count,
                device=device,
                dtype=name,
                threads_per_rank=1,
                chunk_tokens=70,
                sparse_from_tokens=NEVER,
            )
            return asyncio.run(prefill_video(config, video, folder, cases=cases))

        [alone] = prefill(1, [GATHER])
        together = prefill(ranks, kinds)
    rows = []
    for kind, prefix in zip(kinds, together, strict=True):
        wanted = alone.kv.double()
        error = float((prefix.kv.double() - wanted).norm() / wanted.norm())
        rows.append(
            {
                "what": f"{family}, {wanted.shape[2]} tokens",
                "transport": f"rank group, {device}",
                "ranks": ranks,
                "exchange": str(kind),
                "dtype": dtype,
                "error": error,
                "limit": GROUP_LIMITS[dtype],
                "bytes": prefix.outcome.bytes_received,
                "seconds": prefix.outcome.seconds,
                "ok": error <= GROUP_LIMITS[dtype] and prefix.outcome.bytes_received > 0,
            }
        )
    return rows


def cell(value: Any) -> Any:
    """As the table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return f"{value:.2g}" if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
