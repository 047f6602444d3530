"""Command line; see the package."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.processes import end_on_sigterm
from benchmarks.quality import fidelity
from benchmarks.quality.fidelity import adversarial, results, service
from benchmarks.quality.fidelity.comparison import METHODS
from benchmarks.quality.fidelity.scoring import Asked, Setting
from benchmarks.quality.fidelity.videos import Work, run
from benchmarks.quality.fidelity.workers import spread

QUALITIES = ("exact", "high", "balanced", "fast")
SWEEP = (0.05, 0.2, 0.5)
CHECKPOINT = Path("assets/needle-qwen3-vl")
SERVICE_PATCHES = (64, 128, 256, 384, 512)


def works(options: argparse.Namespace) -> Iterator[Work]:
    """The longest first, so that no worker waits at the end."""
    settings = [Setting(quality, ranks) for ranks in options.ranks for quality in QUALITIES]
    settings += [Setting(f"epsilon={epsilon}") for epsilon in options.sweep]
    published = [
        Setting(method, ranks)
        for ranks in options.published_ranks
        for method in ("exact", *options.published)
    ]
    for patches in sorted(options.patches, reverse=True):
        for index in range(options.videos):
            beside = patches in options.published_patches and index < options.published_videos
            wanted = dict.fromkeys([*settings, *(published if beside else ())])
            seed = options.seed * 100_000 + index
            yield Work(
                checkpoint=options.checkpoint,
                sparse_from=options.sparse_from,
                patches=patches,
                questions=options.questions,
                seed=seed,
                settings=tuple(wanted),
            )


def in_process(options: argparse.Namespace) -> list[Asked]:
    """All videos, over worker processes of one thread each."""
    todo = list(works(options))
    asked: list[Asked] = []
    for number, found in enumerate(spread(run, todo, options.workers), 1):
        asked += found
        if number % options.videos == 0:
            print(f"{todo[number - 1].patches} patches: {options.videos} videos", flush=True)
    return sorted(asked, key=lambda one: one.patches)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.fidelity",
        description=fidelity.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--videos", type=int, default=26, help="per length")
    parser.add_argument("--questions", type=int, default=4, help="of each task, per video")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sweep", type=float, nargs="*", default=SWEEP, help="epsilons, one rank")
    parser.add_argument(
        "--published",
        nargs="*",
        default=METHODS,
        choices=METHODS,
        help="methods to compare with; each question takes a prefill",
    )
    parser.add_argument("--published-patches", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--published-videos", type=int, default=6, help="per length")
    parser.add_argument("--published-ranks", type=int, nargs="*", default=[4])
    parser.add_argument("--sparse-from", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--service", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--adversarial", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "fidelity.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write JSON and PNG."""
    options = parse(arguments)
    started = time.perf_counter()
    header: dict[str, Any] = tables.settings(
        checkpoint=str(options.checkpoint),
        seed=options.seed,
        chunk=512,
        sparse_from=options.sparse_from,
        videos=options.videos,
        questions=options.questions,
    )
    asked = in_process(options)
    rows = results.rows_of(asked)
    tables.write(options.out, rows)
    results.print_table(rows, [results.ALL])
    header["losses"] = results.losses(asked)
    print("\npoints of accuracy lost against exact, over all lengths and tasks:")
    names = list(header["losses"][0])
    print(tables.markdown(names, [list(one.values()) for one in header["losses"]]), flush=True)
    if options.adversarial:
        header["adversarial"] = adversarial.report(
            options.checkpoint, options.sparse_from, options.seed, options.workers
        )
    if options.service:
        log = options.out.with_suffix(".service.log")
        more, differing = service.measure(
            options.checkpoint,
            SERVICE_PATCHES,
            3,
            qualities=QUALITIES,
            seed=options.seed,
            sparse_from=options.sparse_from,
            log=log,
        )
        log.unlink()
        rows += more
        results.print_table(more, [results.ALL])
        header["service_exact_differs_from_vllm"] = differing
        print(f"exact answers that differ from vLLM alone, token for token: {differing}")
    header["seconds"] = round(time.perf_counter() - started)
    tables.write(options.out, rows)
    tables.write(options.out.with_suffix(".meta.json"), header)
    results.draw(rows, options.out.with_suffix(".png"))
    print(f"{header['seconds']} s; {len(rows)} rows in {options.out}")


if __name__ == "__main__":
    end_on_sigterm()
    main()
