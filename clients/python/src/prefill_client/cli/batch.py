"""``prefill batch``: questions from a JSONL file, answers to another."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prefill_client.aio import AsyncClient
from prefill_client.batch import BadInputError, BatchProgress, run_batch
from prefill_client.cli.options import attention_options
from prefill_client.cli.progress import ProgressPrinter
from prefill_client.errors import PrefillError

FAILURE = 1
SOME_FAILED = 3
INTERRUPTED = 130
_LISTED = 10


def batch(args: argparse.Namespace, client_arguments: dict[str, Any]) -> int:
    """Run the command; returns the exit status."""
    errors = args.errors or args.output.with_name(args.output.stem + ".errors.jsonl")
    start = time.monotonic()
    try:
        progress = asyncio.run(_run(args, client_arguments, errors, start))
    except BadInputError as error:
        for line in error.lines[:_LISTED]:
            print(f"prefill: {line.error}", file=sys.stderr)
        if len(error.lines) > _LISTED:
            print(f"prefill: ... all of them are in {errors}", file=sys.stderr)
        return FAILURE
    except PrefillError:
        kept = f"{args.output} keeps what was answered; run the same command again to go on"
        print(f"prefill: {kept}", file=sys.stderr)
        raise
    print(_summary(progress, args.output, errors, time.monotonic() - start), flush=True)
    if progress.interrupted:
        return INTERRUPTED
    return SOME_FAILED if progress.failed else 0


async def _run(
    args: argparse.Namespace, client_arguments: dict[str, Any], errors: Path, start: float
) -> BatchProgress:
    printer = ProgressPrinter(sys.stderr, quiet=args.quiet)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    def show(progress: BatchProgress) -> None:
        done = progress.answered + progress.failed
        notes = [f"{progress.failed} failed"] if progress.failed else []
        notes += [f"{progress.running} running"] if progress.running else []
        notes += [_upload(path, upload) for path, upload in list(progress.uploads.items())[:1]]
        printer.show_counts(
            "batch",
            done,
            progress.total,
            elapsed_s=time.monotonic() - start,
            note=", ".join(notes),
        )

    async with AsyncClient(**client_arguments) as client:
        progress = await run_batch(
            client,
            args.input,
            args.output,
            errors,
            concurrency=args.concurrency,
            strict=args.strict,
            defaults=attention_options(args),
            stop=stop,
            on_change=show,
        )
    printer.finish()
    return progress


def _upload(path: str, upload: Any) -> str:
    share = f" {100 * upload.done // upload.total}%" if upload.total else ""
    return f"uploading {Path(path).name}{share}"


def _summary(progress: BatchProgress, output: Path, errors: Path, seconds: float) -> str:
    parts = [f"{progress.answered} answered"]
    if progress.skipped:
        parts.append(f"{progress.skipped} skipped (answered before)")
    if progress.failed:
        parts.append(f"{progress.failed} failed (see {errors})")
    if progress.interrupted:
        parts.append(f"{progress.left} left: run the same command again to go on")
    return f"batch: {', '.join(parts)}; {seconds:.1f} s; answers in {output}"
