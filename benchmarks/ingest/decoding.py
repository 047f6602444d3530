"""Ingest of a long video: ours, and OpenCV grabbing every frame, which is how vLLM samples one.

    python -m benchmarks.ingest.decoding  # an hour, made first if it is not there
    python -m benchmarks.ingest.decoding --video my.mp4 --frames 256 --rounds 1

Both hand over the same frames as RGB at full size, and take turns in processes of their own.

* ours: the store takes the file as an upload would send it (1 MiB pieces; sha256 and fsync), a
  sandboxed child indexes it, and one sandboxed decoder per rank reads its frames, dealt in runs as
  the chunk pipeline deals them.
* OpenCV: ``grab`` up to the last wanted frame, ``retrieve`` the wanted ones, with its own default
  of threads.

``ratio`` is OpenCV's time over ours for index and decode, ``ratio_with_upload`` over everything;
``cpu_s`` is the CPU time of index and decode, which says more than the clock where other programs
use the machine.
Memory is the largest sum of proportional set sizes over the contestant's processes, less what its
first process had before it began.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import MemoryLog, pss_bytes, tree_bytes
from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from prefill_service.video.indexer import index_video
from prefill_service.video.store import VideoStore

OURS = "ours"
OPENCV = "opencv"
HOUR = Path("build") / "hour.mp4"
TARGET_RATIO = 2.0
TARGET_BYTES = 512 << 20
PIECE = 1 << 20
STEP = 80
"""Every 80th pixel, row by row and column by column, is kept to compare the two."""

_DIFFERENCE = 3.0
"""Mean absolute difference of their pixels, at most: they convert colours differently."""


def wanted_frames(count: int, frames: int, share: float) -> np.ndarray:
    """[frames] int64: evenly spread over the first ``share`` of ``count`` frames."""
    last = max(1, round(count * share)) - 1
    return np.linspace(0, last, max(2, round(frames * share))).round().astype(np.int64)


def deal(wanted: np.ndarray, ranks: int, run: int) -> list[list[int]]:
    """The frames of each rank that gets any: runs of ``run`` frames in turn."""
    owner = np.arange(len(wanted)) // run % ranks
    return [wanted[owner == rank].tolist() for rank in range(ranks) if (owner == rank).any()]


# ---- contestants, each in a process of its own ---------------------------------------------


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """Upload into a store, index, decode; writes the kept pixels."""
    with tempfile.TemporaryDirectory(prefix="prefill-ingest-", dir=options.scratch) as folder:
        return asyncio.run(_ours(options, Path(folder)))


async def _ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    limits = VideoConfig()
    with options.video.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _ready()
    store = VideoStore.open(StorageConfig(data_dir=str(folder)), limits)
    start = time.perf_counter()
    size = options.video.stat().st_size
    video = await store.create_upload("video", size, digest)
    with options.video.open("rb") as file:
        offset = 0
        while piece := file.read(PIECE):
            offset = await store.append_chunk(video.video_id, offset, piece)
    uploaded = time.perf_counter()
    await store.finish_upload(video.video_id)
    finished = time.perf_counter()
    async with store.hold_video(video.video_id) as held:
        probing = time.perf_counter()
        cpu = _cpu_s()
        index = await index_video(held.path, limits)
        indexed = time.perf_counter()
        wanted = wanted_frames(index.frame_count, options.frames, options.share)
        pixels = await asyncio.to_thread(
            _decode, held.path, held.index_path, deal(wanted, options.ranks, options.run), limits
        )
        decoded = time.perf_counter()
        cpu = _cpu_s() - cpu
    await store.close()
    order = np.argsort(np.concatenate(deal(wanted, options.ranks, options.run)), kind="stable")
    np.save(options.pixels, np.concatenate(pixels)[order])
    return {
        "upload_s": uploaded - start,
        "finish_s": finished - uploaded,
        "index_s": indexed - probing,
        "decode_s": decoded - indexed,
        "cpu_s": cpu,
        "frames": len(wanted),
    }


def _decode(
    path: Path, index_path: Path, shares: Sequence[list[int]], limits: VideoConfig
) -> list[np.ndarray]:
    """One decoder and one thread per rank, as in the ranks; each [frames, rows, columns, 3]."""
    found: list[list[np.ndarray]] = [[] for _ in shares]

    def read(rank: int) -> None:
        with FrameStream.open(path, index_path, shares[rank], limits) as stream:
            for frame in stream:
                found[rank].append(frame[::STEP, ::STEP].copy())

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for frames, share in zip(found, shares, strict=True):
        if len(frames) != len(share):
            raise RuntimeError(f"{len(frames)} of {len(share)} frames were decoded")
    return [np.stack(frames) for frames in found]


def run_opencv(options: argparse.Namespace) -> dict[str, Any]:
    """Grab every frame, retrieve the wanted ones; writes the kept pixels."""
    import cv2

    _ready()
    start = time.perf_counter()
    cpu = _cpu_s()
    capture = cv2.VideoCapture(str(options.video))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    kept = []
    at = -1
    wanted = wanted_frames(count, options.frames, options.share).tolist()
    for target in wanted:
        while at < target:
            if not capture.grab():
                raise RuntimeError(f"OpenCV cannot read frame {at + 1}")
            at += 1
        _, image = capture.retrieve()
        kept.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB)[::STEP, ::STEP].copy())
    seconds = time.perf_counter() - start
    cpu = _cpu_s() - cpu
    threads = int(capture.get(cv2.CAP_PROP_N_THREADS))
    np.save(options.pixels, np.stack(kept))
    return {"decode_s": seconds, "cpu_s": cpu, "frames": len(wanted), "threads": threads}


def _cpu_s() -> float:
    """CPU seconds of this process and of the children it has waited for."""
    return sum(os.times()[:4])


def _ready() -> None:
    """Everything is loaded; what memory there is by now is not the contestant's."""
    print(json.dumps({"before_bytes": pss_bytes(os.getpid())}), flush=True)


# ---- the race ------------------------------------------------------------------------------


def race(contestant: str, options: argparse.Namespace, pixels: Path) -> dict[str, Any]:
    """Run one contestant; its times and memory."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.ingest.decoding",
        "--contestant",
        contestant,
        "--video",
        str(options.video),
        "--frames",
        str(options.frames),
        "--minutes",
        str(options.minutes),
        "--ranks",
        str(options.ranks),
        "--run",
        str(options.run),
        "--pixels",
        str(pixels),
    ]
    if options.scratch:
        command += ["--scratch", str(options.scratch)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with MemoryLog(lambda: tree_bytes(process.pid)) as memory:
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{contestant} ended with code {process.returncode}")
    first, last = (json.loads(line) for line in output.splitlines())
    return {
        "contestant": contestant,
        **{name: _rounded(value) for name, value in last.items()},
        "memory_mib": round((memory.peak - first["before_bytes"]) / 2**20, 1),
    }


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def compare(ours: Path, theirs: Path) -> float:
    """Mean absolute difference of the kept pixels.

    Raises:
        AssertionError: they are not the same frames.
    """
    one = np.load(ours).astype(int)
    two = np.load(theirs).astype(int)
    if one.shape != two.shape:
        raise AssertionError(f"frames of ours {one.shape}, of OpenCV {two.shape}")
    worst = float(np.abs(one - two).mean(axis=(1, 2, 3)).max())
    if worst > _DIFFERENCE:
        raise AssertionError(f"a frame differs from OpenCV's by {worst:.1f} on average")
    return worst


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of each round, and their median; the largest memory.

    Rounds are pairs of neighbours in time, so that a machine that slows down slows both.
    """
    ours = [row for row in rows if row["contestant"] == OURS]
    theirs = [row for row in rows if row["contestant"] == OPENCV]
    plain = [
        t["decode_s"] / (o["index_s"] + o["decode_s"]) for o, t in zip(ours, theirs, strict=True)
    ]
    whole = [
        t["decode_s"] / (o["upload_s"] + o["finish_s"] + o["decode_s"])
        for o, t in zip(ours, theirs, strict=True)
    ]
    cpu = [t["cpu_s"] / o["cpu_s"] for o, t in zip(ours, theirs, strict=True)]
    ratio = float(np.median(plain))
    memory = max(row["memory_mib"] for row in ours)
    return {
        "ratio": round(ratio, 3),
        "ratio_with_upload": round(float(np.median(whole)), 3),
        "ratio_of_cpu_time": round(float(np.median(cpu)), 3),
        "memory_mib": memory,
        "ratio_met": ratio >= TARGET_RATIO,
        "memory_met": memory * 2**20 <= TARGET_BYTES,
    }


def show(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """Print the table and the targets."""
    from benchmarks.tables import markdown

    names = ("upload_s", "finish_s", "index_s", "decode_s", "cpu_s", "memory_mib")
    lines = [(r["contestant"], r["frames"], *(r.get(name) for name in names)) for r in rows]
    print(markdown(("contestant", "frames", *names), lines))
    print(
        f"\nindex and decode {found['ratio']:.2f} times as fast as OpenCV "
        f"({found['ratio_with_upload']:.2f} with upload, sha256 and fsync; "
        f"{found['ratio_of_cpu_time']:.2f} in CPU time); target {TARGET_RATIO:g}: "
        f"{'met' if found['ratio_met'] else 'NOT MET'}"
    )
    print(
        f"memory of the ingest {found['memory_mib']:.0f} MiB; target "
        f"{TARGET_BYTES >> 20} MiB: {'met' if found['memory_met'] else 'NOT MET'}"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; ``share`` is the part of the file that is read."""
    from benchmarks import tables

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingest.decoding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--video", type=Path, default=HOUR, help="%(default)s; made if absent")
    parser.add_argument("--frames", type=int, default=768, help="%(default)s")
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="of the file's hour; frames shrink with it (%(default)s)",
    )
    parser.add_argument("--ranks", type=int, default=2, help="decoders (%(default)s)")
    parser.add_argument("--run", type=int, default=20, help="frames dealt at once (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="%(default)s")
    parser.add_argument("--scratch", type=Path, help="folder for the store")
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "ingest-cpu.json")
    parser.add_argument("--contestant", choices=(OURS, OPENCV), help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.share = options.minutes / 60.0
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Race, print, write."""
    options = parse(arguments)
    if options.contestant:
        run = run_ours if options.contestant == OURS else run_opencv
        print(json.dumps(run(options)), flush=True)
        return
    from benchmarks import tables

    settings = tables.settings(
        frames=options.frames,
        minutes=options.minutes,
        ranks=options.ranks,
        run=options.run,
        video=options.video.name,
    )
    if not options.video.exists():
        from tools.make_hour_video import write_hour

        print(f"making {options.video}, about a minute", flush=True)
        write_hour(options.video)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="prefill-ingest-") as folder:
        ours = Path(folder) / "ours.npy"
        theirs = Path(folder) / "opencv.npy"
        for number in range(options.rounds):
            # The order changes: what comes second must not always find the warm machine.
            turns = [(OURS, ours), (OPENCV, theirs)]
            for contestant, pixels in turns if number % 2 == 0 else turns[::-1]:
                rows.append(race(contestant, options, pixels))
                print(json.dumps(rows[-1]), flush=True)
        settings["pixel_difference"] = round(compare(ours, theirs), 3)
    index = describe(options.video)
    found = summary(rows)
    show(rows, found)
    tables.write(options.out, {"settings": {**settings, **index}, "summary": found, "rows": rows})


def describe(video: Path) -> dict[str, Any]:
    """What the file is."""
    index: VideoIndex = asyncio.run(index_video(video, VideoConfig()))
    return {
        "size": f"{index.width}x{index.height}",
        "codec": index.codec,
        "duration_s": round(index.duration_s, 1),
        "video_frames": index.frame_count,
        "keyframes": index.keyframe_count,
        "file_mib": round(video.stat().st_size / 2**20),
    }


if __name__ == "__main__":
    main()
