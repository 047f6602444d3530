"""Prefill of a long video on one GPU: dense attention and ours, at model size.

    python -m benchmarks.gpu.prefill
    python -m benchmarks.gpu.prefill --device cpu --tiny

Models of the shapes of Qwen2.5-VL-7B and Qwen3-VL-8B get random weights on the device, and run
through the product's model, exchange and attention, in its chunks; so few layers are run that all
lengths fit the time, and the whole model is extrapolated from them (and, at one length, run as a
check). What attends is generated with the structure of video attention (``inputs``). Dense is
torch's fastest attention here, in chunks of up to 128 K tokens. First every mode's layer is
compared with float32. The rehearsal on a CPU runs all steps on tiny models; its times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.gpu.prefill import report
from benchmarks.gpu.prefill.benchmark import Benchmark
from benchmarks.gpu.prefill.device import Device
from benchmarks.gpu.prefill.inputs import SPREAD
from benchmarks.gpu.prefill.runs import MODES

RESULT = tables.RESULTS / "gpu-prefill.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a layer is wrong, 2 without the device."""
    options = _parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "benchmarks.gpu.prefill needs a CUDA GPU (or --device cpu --tiny); "
            f"torch {torch.__version__} sees none",
            file=sys.stderr,
        )
        return 2
    if options.device == "cpu" and not options.tiny:
        print("on a CPU only --tiny is of any use", file=sys.stderr)
        return 2
    begin = time.monotonic()
    device = Device(torch.device(options.device))
    if not device.cuda:
        torch.set_num_threads(1)  # tiny operations gain nothing from more
    out = options.output or (RESULT if device.cuda else None)

    def save(benchmark: Benchmark) -> None:
        if out:
            tables.write(out, benchmark.result())

    with torch.inference_mode():
        benchmark = Benchmark(options, device, save)
        right = benchmark.run()
    for line in benchmark.budget.skipped:
        print(f"left out: {line}")
    if not right:
        print("a layer is not what float32 makes of it; nothing was timed", file=sys.stderr)
        return 1
    print(f"\n{report.LEGEND}\n")
    for line in report.bounds(benchmark.rows):
        print(line)
    for line in report.targets(benchmark.rows) if device.cuda else ():
        print(line)
    name = f"{device.name}, torch {torch.__version__}, dense: {benchmark.kernel_name}"
    print(f"\n{name}, {time.monotonic() - begin:.0f} s\n")
    print(report.table(benchmark.rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="tiny models and lengths: a rehearsal")
    add("--tokens", type=int, nargs="+", help="video tokens; 32 K to 512 K by default")
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add(
        "--layers", type=int, default=3, help="decoder layers that are run, at least 2; %(default)s"
    )
    add("--budget", type=float, default=480, help="seconds; then lengths are left out; %(default)s")
    add("--turns", type=int, default=2, help="runs of a cell, of which the faster counts")
    add("--once-above", type=float, default=3.0, help="seconds of a cell that is not repeated")
    add(
        "--whole",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run whole models at one length",
    )
    add("--whole-tokens", type=int, help="that length; 128 K by default")
    add("--chunk", type=int, help="tokens per chunk; the service's default")
    add("--mlp-chunk", type=int, help="rows an MLP takes at once; the service's default")
    add("--dense-chunk", type=int, default=131072, help="tokens per chunk of dense; %(default)s")
    add("--sparse-from", type=int, default=0, help="keys; 0: measured as the service does")
    add("--spread", type=float, default=SPREAD, help="noise in what attends; %(default)s")
    add("--mixed", action="store_true", help="all kinds of heads in every group: hardly sparse")
    add("--check-tokens", type=int, help="of the comparison with float32")
    add("--output", type=Path, help=f"result file; on a GPU {RESULT.name} by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
