"""The command line of ``calibrate``; loads nothing that its help does not need."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path

from prefill_service.attention.quality import Quality

_TEXT = """\
Measure how much attention each layer and KV head keeps at several epsilons, and write the budgets
that give the worst head the most at an unchanged number of attended keys. Serve with
--engine-head-budgets FILE. Use a few videos like those to be served, sampled as they will be.

The model is prefilled in this process: per video once for each of seven epsilons, once for
each layer (unless --sensitivity off), and a few times to check the result.
"""


def add_calibrate(commands: argparse._SubParsersAction[typing.Any]) -> None:
    """Add the command to ``prefill-service``."""
    parser = commands.add_parser(
        "calibrate",
        help="write head budgets for engine.head_budgets",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="TEXT", help="folder or hub id of the checkpoint")
    add("--videos", required=True, nargs="+", type=Path, metavar="FILE", help="to calibrate on")
    result = parser.add_mutually_exclusive_group(required=True)
    result.add_argument("--out", type=Path, metavar="FILE", help="the budgets to write")
    result.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="write nothing: print what these budgets do to the videos",
    )
    add(
        "--epsilon",
        type=float,
        default=Quality.BALANCED.step.epsilon,
        metavar="X",
        help="the heads share the keys that this one attends; default: %(default)s, balanced",
    )
    add(
        "--sensitivity",
        choices=["off", "report", "weigh"],
        default="report",
        help="what each layer's approximation alone does to the KV: leave out, put into the "
        "file, or let it weigh the layers' budgets too; default: %(default)s",
    )
    add(
        "--rows",
        type=int,
        default=64,
        metavar="N",
        help="query rows of a chunk that are also attended exactly; default: %(default)s",
    )
    add("--fps", type=float, metavar="X", help="frames per second; default: the processor's")
    add("--num-frames", type=int, metavar="N", help="frames in all, instead of --fps")
    add("--max-pixels", type=int, metavar="N", help="size limit, as in a request's sampling")
    add(
        "--sparse-from-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="queries that see fewer keys attend exactly; default: %(default)s",
    )
    add(
        "--sparse-block-tokens",
        type=int,
        default=64,
        choices=[64, 128],
        help="keys per block, as engine.sparse_block_tokens; default: %(default)s",
    )
    add(
        "--chunk-tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens per chunk of all ranks together; 0: one rank's default",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="default: %(default)s (float32 on CPU)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from prefill_service.calibration.command import calibrate

    return calibrate(args)
