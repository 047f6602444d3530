"""A question about an hour of video through the whole service: first token, overlap, memory.

    python -m benchmarks.ingest.hour  # makes the video first if it is not there
    python -m benchmarks.ingest.hour --video my.mp4 --frames 256 --quality exact

The service runs with two ranks and the trained checkpoint. A short video is asked about first, so
that nothing is warmed up at the hour's expense. Then the hour is uploaded and asked about, and the
job's trace (``prefill trace``) tells what overlapped:

* ``decode``: sum of the slowest rank's decode slices; ``compute``: of vision and prefill slices.
  Decoders and ranks share the cores of a CPU, so each takes longer than it would alone.
* ``hidden``: how much of the shorter of the two went on during the other, on the same rank.
* ``bound``: 1.15 x max(decode, compute) + hand-off, which the first token must not exceed. The
  hand-off is the time from the question's submission to vLLM to its first token.
* ``memory``: largest proportional set size of the service and its ranks and decoders from the
  upload on, without vLLM, less what they had before, less the KV (its pages, and each rank's copy
  of all keys to compute with, of every layer but the last, which attends no more).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefill_client import Client

from benchmarks import tables
from benchmarks.processes import MemoryLog, end_on_sigterm, tree_bytes
from prefill_service.models.checkpoint import open_checkpoint
from tools.make_hour_video import write_hour
from tools.make_video import write_video
from tools.service_process import ServiceProcess

ROOT = Path(__file__).resolve().parents[2]
HOUR = ROOT / "build" / "hour.mp4"
LOG = ROOT / "build" / "hour" / "service.log"
MODEL = ROOT / "assets" / "needle-qwen3-vl"
QUESTION = "How many circles are there?"
FACTOR = 1.15
TARGET_BYTES = 512 << 20
START_S = 900.0
WARM_UP = 64
"""Frames of the short video: more than 2,048 tokens, so that some of its attention is sparse."""

Interval = tuple[float, float]
Event = dict[str, Any]


def slices(trace: dict[str, Any]) -> dict[str, dict[str, list[Event]]]:
    """The trace's slices by the names of their process and row."""
    names = {
        (e["pid"], None if e["name"] == "process_name" else e["tid"]): e["args"]["name"]
        for e in trace["traceEvents"]
        if e["ph"] == "M" and e["name"] in ("process_name", "thread_name")
    }
    found: dict[str, dict[str, list[Event]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows = found.setdefault(names[event["pid"], None], {})
            rows.setdefault(names[event["pid"], event["tid"]], []).append(event)
    return found


def intervals(events: Iterable[Event]) -> list[Interval]:
    """Beginning and end of the chunks among them, seconds, in order; they do not overlap."""
    chunks = [e for e in events if e["name"].startswith("chunk")]
    return sorted((e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in chunks)


def length(parts: Iterable[Interval]) -> float:
    """Sum of the intervals' lengths."""
    return sum(end - start for start, end in parts)


def overlap(ones: Sequence[Interval], others: Sequence[Interval]) -> float:
    """How long both go on."""
    return sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in ones
        for other_start, other_end in others
    )


def read_trace(trace: dict[str, Any], first_token_s: float) -> dict[str, float]:
    """What a job's trace says of overlap, and the bound (see the module)."""
    found = slices(trace)
    ranks = [rows for name, rows in found.items() if name.startswith("rank")]
    decode = [intervals(rows["decode"]) for rows in ranks]
    vision = [intervals(rows["vision"]) for rows in ranks]
    prefill = [intervals(rows["prefill"]) for rows in ranks]
    compute = [sorted(v + p) for v, p in zip(vision, prefill, strict=True)]
    handoff = max(
        e["dur"] / 1e6
        for e in found["service"]["questions"]
        if e["name"] == "hand-off and first token"
    )
    decode_s = max(map(length, decode))
    compute_s = max(map(length, compute))
    hidden = sum(overlap(d, c) for d, c in zip(decode, compute, strict=True))
    shorter = sum(min(length(d), length(c)) for d, c in zip(decode, compute, strict=True))
    bound = FACTOR * max(decode_s, compute_s) + handoff
    return {
        "first_token_s": first_token_s,
        "decode_s": decode_s,
        "vision_s": max(map(length, vision)),
        "prefill_s": max(map(length, prefill)),
        "compute_s": compute_s,
        "handoff_s": handoff,
        "before_ranks_s": min(start for rank in decode for start, _ in rank),
        "hidden": hidden / shorter,
        "bound_s": bound,
        "first_token_over_bound": first_token_s / bound,
    }


def ask(client: Client, path: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Upload and ask; the row, but for memory, and the trace."""
    start = time.perf_counter()
    video = client.upload(path)
    uploaded = time.perf_counter()
    stream = client.ask(
        video,
        QUESTION,
        num_frames=options.frames,
        quality=options.quality,
        max_tokens=4,
        ignore_eos=True,
    )
    first = None
    for _ in stream:
        first = first or time.perf_counter() - uploaded
    answer = stream.result()
    job = client.job(answer.job_id)
    text = client.trace_job(answer.job_id)
    assert job.result is not None
    row = {
        "upload_s": uploaded - start,
        **read_trace(json.loads(text), first or answer.timings.first_token_s),
        "video_tokens": answer.usage.video_tokens,
        "prompt_tokens": answer.usage.prompt_tokens,
        "kv_bytes": job.result.kv_bytes,
        "density": job.result.attention.total.density if job.result.attention else 1.0,
        "trace_bytes": len(text.encode()),
    }
    return row, text


def measure(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """Start the service, warm it up, ask about the hour."""
    arguments = [
        "--model",
        str(options.checkpoint),
        "--ranks",
        str(options.ranks),
        "--device",
        "cpu",
        "--engine-threads-per-rank",
        "1",
        "--data-dir",
        str(folder / "data"),
    ]
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with ServiceProcess(arguments, LOG) as service:
        service.wait_ready(START_S, lambda _: None)

        def ours() -> int:
            return tree_bytes(service.pid, leave_out="vllm_server")

        with Client(service.address) as client:
            short = write_video(folder / "short.mp4", seconds=8, width=640, height=360)
            client.ask(
                short,
                QUESTION,
                num_frames=WARM_UP,
                max_pixels=WARM_UP * 256 * 288,
                quality=options.quality,
                max_tokens=4,
            ).result()
            before = ours()
            with MemoryLog(ours) as memory:
                row, trace = ask(client, options.video, options)
    kv = row["kv_bytes"] + options.ranks * working_bytes(options.checkpoint, row["prompt_tokens"])
    row["memory_mib"] = (memory.peak - before - kv) / 2**20
    row["kv_mib"] = kv / 2**20
    row["before_mib"] = before / 2**20
    return row, trace


def working_bytes(model: Path, tokens: int) -> int:
    """K and V that a rank computes with, float32."""
    shape = replace(open_checkpoint(str(model)).shape, dtype="float32")
    return shape.attending_layers * shape.row_bytes * tokens


def show(row: dict[str, Any]) -> None:
    """Print what was found, and the targets."""
    print(tables.markdown(("what", "measured"), sorted(row.items())))
    met = "met" if row["first_token_over_bound"] <= 1 else "NOT MET"
    print(
        f"\nfirst token after {row['first_token_s']:.1f} s; bound {FACTOR:g} x max(decode "
        f"{row['decode_s']:.1f}, vision + prefill {row['compute_s']:.1f}) + hand-off "
        f"{row['handoff_s']:.2f} = {row['bound_s']:.1f} s: {met}"
    )
    print(f"{row['hidden']:.0%} of the shorter of the two went on during the other")
    met = "met" if row["memory_mib"] * 2**20 <= TARGET_BYTES else "NOT MET"
    print(f"memory above model and KV {row['memory_mib']:.0f} MiB of {TARGET_BYTES >> 20}: {met}")


def main() -> None:
    """Measure, print, write the row and the trace."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest.hour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--video", type=Path, default=HOUR, help="made if absent")
    parser.add_argument("--checkpoint", type=Path, default=MODEL)
    parser.add_argument("--frames", type=int, default=768, help="%(default)s")
    parser.add_argument("--ranks", type=int, default=2, help="%(default)s")
    parser.add_argument("--quality", default="balanced", help="%(default)s")
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "hour-cpu.json")
    parser.add_argument("--trace", type=Path, default=tables.RESULTS / "hour-trace.json")
    options = parser.parse_args()
    settings = tables.settings(
        video=options.video.name,
        frames=options.frames,
        ranks=options.ranks,
        quality=options.quality,
        checkpoint=options.checkpoint.name,
    )
    if not options.video.exists():
        print(f"making {options.video}, about a minute", flush=True)
        write_hour(options.video)
    with tempfile.TemporaryDirectory(prefix="prefill-hour-") as folder:
        row, trace = measure(options, Path(folder))
    row = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
    show(row)
    tables.write(options.out, {"settings": settings, "rows": [row]})
    options.trace.parent.mkdir(parents=True, exist_ok=True)
    options.trace.write_text(trace + "\n")
    print(f"trace: {options.trace}, {row['trace_bytes']} bytes; open it at https://ui.perfetto.dev")


if __name__ == "__main__":
    end_on_sigterm()
    main()
