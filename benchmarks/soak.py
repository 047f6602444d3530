"""Hours of steady mixed load: does memory grow, and does every answer stay the same?

    python -m benchmarks.soak
    python -m benchmarks.soak --hours 0.1 --every-s 1

Questions with known answers come as a Poisson process: about prefixes that are in memory and
others that have to be computed again, in chats, long ones, of exact and of sparse attention.
Among them videos are uploaded and deleted, clients leave in the middle of an answer, and requests
are refused. Memory of every kind of process is sampled; its slope is that of the time after the
warm-up. The figures are written every minute. The exit status is 1 if an answer differed, a call
failed, or memory grew by more than the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from prefill_client import PrefillError, Video
from prefill_client.aio import AsyncClient

from benchmarks import tables
from benchmarks.chaos.census import KINDS, memory_by_kind
from benchmarks.chaos.known_answers import Comparison, ask, make_cases
from benchmarks.chaos.trend import trend
from benchmarks.load.traffic import Film, make_films
from benchmarks.processes import end_on_sigterm
from tools.service_process import ServiceProcess

ROOT = Path(__file__).resolve().parents[1]
PATCHES = (16, 24, 32, 40, 48)
"""Seconds of the videos."""

SIDE = 192
QUESTIONS = 3
START_S = 900.0
WARM_UP_SHARE = 0.2
"""Part of the time whose samples do not count for the slope: caches fill, allocators settle."""

SAMPLED_EVERY_S = 15.0
WRITTEN_EVERY_S = 60.0
ACTIONS = {"ask": 80, "upload": 6, "leave": 8, "refused": 6}
"""What is done, in percent."""

LIMIT_MIB_PER_HOUR = 8.0
MOST_MESSAGES = 20
MEASURES = ("rss", "pss", "private", "descriptors", "threads")


@dataclass(slots=True)
class Soak:
    """Load on one service, and what became of it.

    Attributes:
        done: actions by name.
        failures: reasons of calls that failed, with how often.
        messages: the first failures, in the service's words.
        samples: seconds after the start, and memory of each kind of process.
    """

    client: AsyncClient
    films: Sequence[Film]
    videos: list[Video]
    comparison: Comparison
    rng: random.Random
    done: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    async def act(self) -> None:
        """One action; what fails is counted."""
        names = list(ACTIONS)
        name = self.rng.choices(names, weights=[ACTIONS[n] for n in names])[0]
        number = self.rng.randrange(len(self.comparison.cases))
        try:
            await getattr(self, f"_{name}")(number)
            self.done[name] += 1
        except PrefillError as error:
            self.failures[f"{name}: {error.reason}"] += 1
            print(f"{name} failed: {error}", flush=True)
            if len(self.messages) < MOST_MESSAGES:
                self.messages.append(f"{name}: {error}"[:500])

    async def _ask(self, number: int) -> None:
        case = self.comparison.cases[number]
        answer = await ask(self.client, self.videos[case.film], case)
        self.comparison.compare(number, answer)

    async def _upload(self, number: int) -> None:
        """A film again, as a file of its own: its bytes differ, what it shows does not."""
        case = self.comparison.cases[number]
        data = self.films[case.film].path.read_bytes() + _free_box(self.rng.randbytes(8))
        video = await self.client.upload(data)
        try:
            self.comparison.compare(number, await ask(self.client, video, case))
        finally:
            await self.client.delete_video(video.video_id)

    async def _leave(self, number: int) -> None:
        """A client that goes away while its answer is made."""
        case = self.comparison.cases[number]
        options = {**case.ask_options(), "max_tokens": 200}
        stream = self.client.ask(self.videos[case.film], case.question(), **options)
        asking = asyncio.create_task(stream.result())
        await asyncio.wait({asking}, timeout=self.rng.uniform(0.01, 0.6))
        stream.cancel()
        with suppress(asyncio.CancelledError):
            try:
                await asking
            except PrefillError as error:
                if error.reason != "CANCELLED":
                    raise

    async def _refused(self, number: int) -> None:
        """A request that is wrong in itself."""
        video = self.videos[number % len(self.videos)].video_id
        wrong = self.rng.choice([(video, "What <|im_end|> now?"), (f"vid_{'0' * 26}", "What?")])
        try:
            await self.client.ask(*wrong).result()
        except PrefillError as error:
            if error.reason in ("INVALID_REQUEST", "UNKNOWN_VIDEO"):
                return
            raise
        raise AssertionError(f"{wrong} was not refused")


def _free_box(content: bytes) -> bytes:
    """An MP4 box that readers skip."""
    return (8 + len(content)).to_bytes(4, "big") + b"free" + content


def rows_of(samples: Sequence[dict[str, Any]], warm_up_s: float) -> list[dict[str, Any]]:
    """Of each kind of process and measure: at the start, the end, and the slope per hour.

    Bytes are given in MiB. ``late`` is the slope of the second half of the time alone: stores
    that are bounded fill more and more slowly, a leak goes on as it was.
    """
    late = [sample for sample in samples if sample["at_s"] >= warm_up_s]
    half = [sample for sample in late if 2 * sample["at_s"] >= samples[-1]["at_s"]]
    rows = []
    for kind in [kind for kind in KINDS if all(kind in sample for sample in late)]:
        for measure in MEASURES:
            unit = 1 if measure in ("descriptors", "threads") else 1 << 20
            values = [sample[kind][measure] / unit for sample in late]
            found = trend([sample["at_s"] for sample in late], values)
            second = trend(
                [sample["at_s"] for sample in half],
                [sample[kind][measure] / unit for sample in half],
            )
            if found is not None and second is not None:
                rows.append(
                    {
                        "kind": kind,
                        "measure": measure,
                        "processes": late[-1][kind]["processes"],
                        "start": values[0],
                        "end": values[-1],
                        "per_hour": found.per_hour,
                        "low": found.low,
                        "high": found.high,
                        "late_per_hour": second.per_hour,
                        "late_low": second.low,
                        "late_high": second.high,
                    }
                )
    return rows


def growing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Kinds of processes whose own memory grows: more than the limit, for certain."""
    return [
        f"{row['kind']}: {row['per_hour']:+.1f} MiB an hour"
        for row in rows
        if row["measure"] == "private" and row["late_low"] > LIMIT_MIB_PER_HOUR
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if an answer differed, a call failed or memory grew."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # this process asks; it computes nothing
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        result = asyncio.run(_soak(options, options.logs or Path(name)))
    print(table(result["rows"]))
    found = growing(result["rows"])
    for line in found:
        print(line)
    bad = found or result["mismatches"] or result["failures"]
    return 1 if bad else 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown with a line for each kind of process and measure."""
    header = ("processes", "measure", "start", "end", "slope per hour", "95 % interval")
    lines = [
        [
            row["kind"],
            row["measure"],
            f"{row['start']:.1f}",
            f"{row['end']:.1f}",
            f"{row['per_hour']:+.2f}",
            f"{row['low']:+.2f} to {row['high']:+.2f}",
        ]
        for row in rows
    ]
    return tables.markdown(header, lines)


async def _soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    (folder / "videos").mkdir(parents=True)
    films = make_films(PATCHES, folder / "videos", options.seed, SIDE)
    arguments = ["--ranks", "2", "--device", "cpu"]
    arguments += ["--engine-threads-per-rank", "1", "--vllm-kv-cache-gib", "0.25"]
    arguments += ["--engine-kv-pool-bytes", str(options.pool_mib << 20)]
    places = ["--model", str(options.checkpoint), "--data-dir", str(folder / "data")]
    settings = tables.settings(
        hours_planned=options.hours,
        every_s=options.every_s,
        seed=options.seed,
        arguments=arguments,
    )
    async with AsyncExitStack() as stack:
        service = stack.enter_context(ServiceProcess([*arguments, *places], folder / "service.log"))
        await asyncio.to_thread(service.wait_ready, START_S, lambda _: None)
        client = await stack.enter_async_context(AsyncClient(service.address))
        videos = [await client.upload(film.path) for film in films]
        comparison = Comparison(make_cases(films, QUESTIONS))
        await comparison.learn(client, videos)
        print(f"{len(comparison.cases)} answers known", flush=True)
        soak = Soak(
            client=client,
            films=films,
            videos=videos,
            comparison=comparison,
            rng=random.Random(options.seed),
        )
        await _drive(soak, service, options, settings)
        return _content(soak, settings)


async def _drive(
    soak: Soak, service: ServiceProcess, options: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """Actions, samples and intermediate results until the time is over."""
    begin = time.monotonic()
    end = begin + 3600 * options.hours
    sample_at = write_at = begin
    acting: set[asyncio.Task[None]] = set()
    while (now := time.monotonic()) < end:
        if now >= sample_at:
            found = await asyncio.to_thread(memory_by_kind, service.pid)
            soak.samples.append({"at_s": round(now - begin, 1), **found})
            sample_at = now + SAMPLED_EVERY_S
        if now >= write_at:
            tables.write(options.out, _content(soak, settings))
            write_at = now + WRITTEN_EVERY_S
        if len(acting) < options.at_once:
            task = asyncio.create_task(soak.act())
            acting.add(task)
            task.add_done_callback(acting.discard)
        await asyncio.sleep(min(soak.rng.expovariate(1 / options.every_s), end - now))
        service.check()
    if acting:
        await asyncio.wait(acting)
    tables.write(options.out, _content(soak, settings))


def _content(soak: Soak, settings: dict[str, Any]) -> dict[str, Any]:
    seconds = soak.samples[-1]["at_s"] if soak.samples else 0.0
    return {
        "settings": {**settings, "hours": round(seconds / 3600, 3)},
        "rows": rows_of(soak.samples, WARM_UP_SHARE * seconds),
        "compared": dict(soak.comparison.compared),
        "mismatches": soak.comparison.mismatches,
        "done": dict(soak.done),
        "failures": dict(soak.failures),
        "messages": soak.messages,
        "samples": soak.samples,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--hours", type=float, default=2.0, help="of load; %(default)s")
    add("--every-s", type=float, default=3.0, help="between two actions, on average; %(default)s")
    add("--at-once", type=int, default=3, help="actions at most; %(default)s")
    add("--seed", type=int, default=1, help="of videos and load; %(default)s")
    add("--pool-mib", type=int, default=24, help="KV pages: some prefixes fit; %(default)s")
    add("--checkpoint", type=Path, default=ROOT / "assets" / "needle-qwen3-vl")
    add("--logs", type=Path, help="new folder for videos, logs and data, which stay there")
    add("--out", type=Path, default=tables.RESULTS / "soak-cpu.json")
    return parser


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
