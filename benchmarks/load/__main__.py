"""Twenty clients for ten minutes: the service, then vLLM alone, under the same arrivals.

    python -m benchmarks.load
    python -m benchmarks.load --minutes 1 --clients 4 --systems ours

Questions with known answers about needle videos of 16 seconds to six minutes come as a Poisson
process; half of them are about a video that somebody asked about before. Every system has the
machine to itself, the same files, and the same arrivals. vLLM alone reads the files in place and
keeps its caches of prefixes and of processed videos; the service has the files uploaded. The exit
status is 1 if a question failed, or a system did not start.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.load import report
from benchmarks.load.drive import Record, drive
from benchmarks.load.systems import LoadedSystem, Ours, VllmAlone
from benchmarks.load.traffic import LENGTHS, Film, Traffic, make_films, plan_traffic
from benchmarks.processes import MemoryLog, Sample, end_on_sigterm, tree_bytes

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("ours", "vllm")
PATCH_PIXELS = 32
PATCH_TEXT = 12
ROOM = 512
"""A token covers 32 x 32 pixels of two frames; before a patch there is a timestamp, after the video
a question."""
SAMPLED_EVERY_S = 5.0
WARM_UP = (16, 64)
"""Temporal patches of the videos that are asked about before the clock starts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a question failed or a system did not start."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # this process asks; it computes nothing
    seconds = 60 * options.minutes
    try:
        traffic = plan_traffic(
            seconds,
            options.clients,
            options.rate,
            seed=options.seed,
            known_share=options.known_share,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not traffic.arrivals:
        print(f"no question comes up in {options.minutes} minutes", file=sys.stderr)
        return 2
    known = sum(not arrival.fresh for arrival in traffic.arrivals)
    print(
        f"{len(traffic.arrivals)} questions of {traffic.clients} clients in {options.minutes:g} "
        f"minutes, {known} about known videos; {len(traffic.patches)} videos, "
        f"{sum(traffic.patches) / 60:.0f} minutes of film",
        flush=True,
    )
    records: dict[str, list[Record]] = {}
    samples: dict[str, list[Sample]] = {}
    starts: dict[str, float] = {}
    commands: dict[str, list[str]] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="load-") as name:
        folder = options.logs or Path(name)
        films = make_films(traffic.patches, _made(folder / "videos"), options.seed, options.side)
        warm = make_films(WARM_UP, _made(folder / "warm"), options.seed + 1, options.side)
        for system_name in options.systems:
            system = _systems(options, _made(folder / system_name))[system_name]()
            try:
                found = asyncio.run(_measure(system, traffic, films, warm))
            except RuntimeError as error:  # it did not start; the other one's figures stand
                print(f"{system_name}: {error}", file=sys.stderr)
                failed.append(system_name)
                continue
            records[system_name], samples[system_name], starts[system_name] = found
            commands[system_name] = list(system.arguments)
            _show(system_name, records[system_name], samples[system_name], seconds)
    rows = [
        row for name, found in records.items() for row in report.summarize(name, found, seconds)
    ]
    settings = tables.settings(
        minutes=options.minutes,
        clients=options.clients,
        rate=options.rate,
        seed=options.seed,
        known_share=options.known_share,
        side=options.side,
        quality=options.quality,
        cold_start_s=starts,
        arguments=commands,
    )
    tables.write(options.out, report.content(settings, rows, records, samples))
    report.draw(records, samples, options.out.with_suffix(".png"))
    _summary(rows, records, samples)
    print(f"\n{options.out} and {options.out.with_suffix('.png').name} written")
    asked = [record for found in records.values() for record in found]
    return 1 if failed or any(record.error for record in asked) else 0


async def _measure(
    system: LoadedSystem, traffic: Traffic, films: Sequence[Film], warm: Sequence[Film]
) -> tuple[list[Record], list[Sample], float]:
    """Records, memory, and seconds that the start took."""
    begin = time.monotonic()
    done = 0

    def said(record: Record) -> None:
        nonlocal done
        done += 1
        if record.error:
            print(f"{system.name}: question at {record.at_s:.0f} s failed: {record.error}")
        if done % 20 == 0:
            print(f"{system.name}: {done} of {len(traffic.arrivals)}", flush=True)

    async with system:
        started_s = time.monotonic() - begin
        print(f"{system.name} serves after {started_s:.0f} s", flush=True)
        for film in warm:
            await system.ask(0, film, film.question(0).text)
        with MemoryLog(lambda: tree_bytes(system.pid), SAMPLED_EVERY_S) as memory:
            records = await drive(system, traffic, films, said=said)
    return records, memory.samples, started_s


def _systems(options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], LoadedSystem]]:
    cores = len(os.sched_getaffinity(0))
    pool = options.pool_mib << 20
    longest = max(LENGTHS) * ((options.side // PATCH_PIXELS) ** 2 + PATCH_TEXT) + ROOM
    return {
        "ours": lambda: Ours(
            options.checkpoint,
            folder,
            options.clients,
            cores=cores,
            quality=options.quality,
            pool_bytes=pool,
        ),
        "vllm": lambda: VllmAlone(options.checkpoint, folder, cores, longest),
    }


def _show(name: str, records: list[Record], samples: list[Sample], seconds: float) -> None:
    print(report.table(report.summarize(name, records, seconds)))
    if samples:
        print(report.table([report.memory_row(name, samples)], report.MEMORY_COLUMNS), flush=True)


def _summary(
    rows: list[dict[str, Any]],
    records: dict[str, list[Record]],
    samples: dict[str, list[Sample]],
) -> None:
    print(f"\n{report.LEGEND}\n")
    for line in [report.agreement(records), *report.ratios(rows)]:
        if line:
            print(line)
    memory = [report.memory_row(name, found) for name, found in samples.items() if found]
    print("\n" + report.table(memory, report.MEMORY_COLUMNS))
    print("\n" + report.table(rows))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="in which questions come; %(default)s")
    add("--clients", type=int, default=20, help="%(default)s")
    add("--rate", type=float, default=12.0, help="questions per minute of all; %(default)s")
    add("--seed", type=int, default=1, help="%(default)s")
    add("--known-share", type=float, default=0.5, help="of questions, about videos asked before")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="in this order")
    add("--side", type=int, default=192, help="pixels of a video's side; %(default)s")
    add("--checkpoint", type=Path, default=ROOT / "assets" / "needle-qwen3-vl")
    add("--quality", default="balanced", help="of the service's attention; %(default)s")
    add("--pool-mib", type=int, default=192, help="the service's KV pages; %(default)s")
    add("--logs", type=Path, help="new folder for videos, logs and data, which stay there")
    add("--out", type=Path, default=tables.RESULTS / "load-cpu.json")
    return parser


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
