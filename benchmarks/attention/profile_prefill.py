"""Where the time of a prefill goes on one CPU core, and how far from the floor each part is.

    python -m benchmarks.attention.profile_prefill  # on the larger benchmark checkpoint
    python -m benchmarks.attention.profile_prefill --checkpoint MODEL --tokens 8192

One process computes a synthetic video as one rank does, vision tower first. The floor of matrix
products is their FLOPs at the rate that the same operators reach alone, in this run. Seconds are
the clock's, on one thread: nothing else should run. ``--operators N`` adds the N most expensive
operators, by torch's profiler.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import tables
from prefill_service.attention.dense import attend
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings
from prefill_service.calibration.encoded_video import EncodedVideo, PlannedVideo, encode_video
from prefill_service.calibration.local_prefill import LocalPrefill
from prefill_service.config import VideoConfig
from prefill_service.models.checkpoint import Checkpoint, open_checkpoint
from prefill_service.models.layers.packed_linear import PackedLinear
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.indexer import index_video
from tools.make_bench_checkpoint import build_larger
from tools.make_video import write_video

LARGER = Path(__file__).parents[2] / "build" / "checkpoints" / "bench-qwen3-vl"
_WIDTH = 320
_HEIGHT = 224
_TOKENS_PER_PATCH = 79  # of two such frames, timestamp included
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention.profile_prefill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, help="the larger one of bench-service")
    parser.add_argument("--tokens", type=int, default=16384, help="about so many (%(default)s)")
    parser.add_argument(
        "--quality", nargs="+", type=Quality, default=[Quality.EXACT, Quality.BALANCED]
    )
    parser.add_argument("--chunk", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--operators", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "profile-cpu.json")
    options = parser.parse_args(argv)
    options.checkpoint = options.checkpoint or build_larger(LARGER)
    torch.set_num_threads(1)
    rows = measure(options)
    print(f"{options.checkpoint.name}, float32, one core, chunks of {options.chunk} tokens")
    print(
        tables.markdown(
            ["part", "seconds", "share", "TFLOP", "GFLOP/s", "alone", "of that"],
            [[r["part"], f"{r['seconds']:.2f}", f"{r['share']:.0%}", *_rates(r)] for r in rows],
        )
    )
    about = tables.settings(checkpoint=options.checkpoint.name, chunk_tokens=options.chunk)
    tables.write(options.out, {"settings": about, "rows": rows})


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per quality and part; the tower first."""
    checkpoint = open_checkpoint(str(options.checkpoint))
    model = PrefillModel(checkpoint, torch.float32, CPU, 1024)
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        start = time.perf_counter()
        video = _video(checkpoint, options.tokens, Path(folder), model=model, chunk=options.chunk)
        rows = [_row("decode and vision tower", time.perf_counter() - start, 1.0)]
    for quality in options.quality:
        rows += _prefill(model, video, quality, options.chunk)
        if options.operators:
            _print_operators(model, video, quality, options.operators)
    return rows


def _video(
    checkpoint: Checkpoint, tokens: int, folder: Path, *, model: PrefillModel, chunk: int
) -> EncodedVideo:
    seconds = max(2, tokens // _TOKENS_PER_PATCH)
    path = write_video(folder / "video.mp4", seconds, 2.0, width=_WIDTH, height=_HEIGHT)
    index = asyncio.run(index_video(path, VideoConfig()))
    plan = PrefixPlanner(checkpoint, "float32").plan(index, path.name, FrameSampling(fps=2.0), "")
    return encode_video(PlannedVideo(path, index, plan), model, chunk, folder)


def _prefill(
    model: PrefillModel, video: EncodedVideo, quality: Quality, chunk: int
) -> list[dict[str, Any]]:
    run = _run(model, video, quality)
    with _timed_linears(model) as linear:
        start = time.perf_counter()
        reports = run.run()
        total = time.perf_counter() - start
    tokens = video.plan.num_tokens
    density = _attended(reports) / _causal(reports)
    parts = {
        "linear layers": linear.seconds,
        "attention": sum(report.attend_s for report in reports),
        "selection": sum(report.select_s for report in reports),
        "certificate": sum(report.verify_s for report in reports),
    }
    parts["all else"] = total - sum(parts.values())
    flops = {
        "linear layers": _linear_flops(model) * tokens,
        "attention": _attention_flops(model, reports),
    }
    alone = {
        "linear layers": _linear_rate(model, chunk),
        "attention": _attention_rate(model, chunk, tokens // 2),
    }
    return [
        _row(f"{quality}, {tokens:,} tokens, density {density:.3f}", total, 1.0),
        *(
            _row(
                f"  {part}", seconds, seconds / total, flops=flops.get(part), alone=alone.get(part)
            )
            for part, seconds in parts.items()
            if seconds > 0
        ),
    ]


def _run(model: PrefillModel, video: EncodedVideo, quality: Quality) -> LocalPrefill:
    return LocalPrefill(model, video, SparseSettings(from_tokens=1024), resolve_policy(quality))


@dataclass(slots=True)
class _Timed:
    """Seconds inside some modules; ``start`` is of the call under way."""

    seconds: float = 0.0
    start: float = 0.0


@contextmanager
def _timed_linears(model: PrefillModel) -> Iterator[_Timed]:
    """Time what runs in the decoder's linear layers, by hooks on them."""
    timed = _Timed()

    def enter(*_: object) -> None:
        timed.start = time.perf_counter()

    def leave(*_: object) -> None:
        timed.seconds += time.perf_counter() - timed.start

    linears = [
        m for m in model._model.language_model.modules() if isinstance(m, (PackedLinear, nn.Linear))
    ]
    hooks = [m.register_forward_pre_hook(enter) for m in linears]
    hooks += [m.register_forward_hook(leave) for m in linears]
    try:
        yield timed
    finally:
        for hook in hooks:
            hook.remove()


def _print_operators(
    model: PrefillModel, video: EncodedVideo, quality: Quality, count: int
) -> None:
    run = _run(model, video, quality)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=count))


def _row(
    part: str,
    seconds: float,
    share: float,
    *,
    flops: float | None = None,
    alone: float | None = None,
) -> dict[str, Any]:
    return {"part": part, "seconds": seconds, "share": share, "flops": flops, "alone_flop_s": alone}


def _rates(row: dict[str, Any]) -> list[str]:
    if not row["flops"]:
        return ["-"] * 4
    rate = row["flops"] / row["seconds"]
    return [
        f"{row['flops'] / 1e12:.2f}",
        f"{rate / 1e9:.0f}",
        f"{row['alone_flop_s'] / 1e9:.0f}",
        f"{rate / row['alone_flop_s']:.0%}",
    ]


def _linear_flops(model: PrefillModel) -> float:
    """Per token; of the last layer only what makes its keys and values, and its queries."""
    layers = model._model.language_model.layers
    found = 0.0
    for number, layer in enumerate(layers):
        for name, part in layer.named_modules():
            last = number == len(layers) - 1
            if hasattr(part, "out_features") and (not last or name[-6:] in _OF_KV):
                found += 2.0 * part.in_features * part.out_features
    return found


_OF_KV = ("q_proj", "k_proj", "v_proj")


def _attended(reports: list[LayerReport]) -> float:
    return sum(sum(report.attended) for report in reports)


def _causal(reports: list[LayerReport]) -> float:
    return sum(report.causal * len(report.attended) for report in reports)


def _attention_flops(model: PrefillModel, reports: list[LayerReport]) -> float:
    return 4.0 * model.shape.head_dim * model.shape.queries_per_kv * _attended(reports)


@torch.inference_mode()
def _linear_rate(model: PrefillModel, rows: int) -> float:
    layer = model._model.language_model.layers[0].mlp.up_proj
    x = torch.randn(rows, layer.in_features)
    flops = 2.0 * rows * int(layer.in_features) * int(layer.out_features)
    return flops / _best(lambda: layer(x))


@torch.inference_mode()
def _attention_rate(model: PrefillModel, rows: int, keys: int) -> float:
    shape = model.shape
    q = torch.randn(shape.q_heads, rows, shape.head_dim)
    k, v = torch.randn(2, shape.kv_heads, keys, shape.head_dim)
    seconds = _best(lambda: attend(q, k, v, causal=False, scale=0.1))
    return 4.0 * shape.q_heads * rows * keys * shape.head_dim / seconds


def _best(work: Callable[[], object], times: int = 10) -> float:
    """Seconds of one call, the least of ``times``."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found[1:])


if __name__ == "__main__":
    main()
