"""Send mutated video files to sandboxed decoders, and see that only they suffer.

    python -m tools.fuzz_decoder VIDEO... --seconds 600 --keep build/fuzz
    python -m tools.fuzz_decoder --seconds 60           # one small file of each container

Each round takes a file, changes some of its bytes, has it indexed and some frames read, as the
service does. Every end but an index, frames or a reason that blames the file is a finding: its
file is kept and the exit status is 1. A decoder that crashes is none; how many did is said.
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
from pathlib import Path

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.indexer import index_video
from tools.make_video import write_video

CONTAINERS = {
    ".mp4": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".ts": "libx264",
    ".mpg": "mpeg2video",
    ".avi": "mpeg4",
    ".flv": "libx264",
    ".mov": "mpeg4",
}
BLAMES_THE_FILE = frozenset(
    {
        Reason.NOT_A_VIDEO,
        Reason.FORMAT_NOT_ALLOWED,
        Reason.NO_VIDEO_STREAM,
        Reason.NO_FRAMES,
        Reason.TRUNCATED_VIDEO,
        Reason.VIDEO_LIMIT_EXCEEDED,
        Reason.DECODE_FAILED,
        Reason.DECODE_TIMEOUT,
    }
)
LIMITS = VideoConfig(probe_timeout_s=20.0, stall_timeout_s=20.0, max_frame_pixels=1 << 22)
_FRAMES = 3


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a range overwritten, removed, doubled or moved, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed))
        # Headers decide more than payload does: half of all changes are near the start.
        if rng.random() < 0.5:
            start = rng.randrange(min(len(changed), 1024))
        end = min(len(changed), start + rng.choice((1, 1, 2, 4, 8, 64, 1000)))
        kind = rng.randrange(6)
        if kind == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[start:end] = rng.randbytes(end - start)
        elif kind == 2:
            changed[start:end] = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * (end - start)
        elif kind == 3:
            changed[start:start] = changed[start:end]
        elif kind == 4:
            del changed[start:end]
        else:
            del changed[max(1, start) :]
        if not changed:
            changed += data
    return bytes(changed)


async def outcome_of(path: Path, index_path: Path, pool: DecoderPool) -> str:
    """What becomes of a file: ``frames``, or a reason; anything else is raised."""
    try:
        index = await index_video(path, LIMITS, pool, allow_truncated=True)
        index.save(index_path)
        wanted = sorted({0, index.frame_count // 2, index.frame_count - 1})[:_FRAMES]
        await asyncio.to_thread(_read, path, index_path, wanted, pool)
    except ServiceError as error:
        if error.reason not in BLAMES_THE_FILE:
            raise
        crash = " (crash)" if "was killed by" in error.message else ""
        return f"{error.reason}{crash}"
    return "frames"


def _read(path: Path, index_path: Path, wanted: list[int], pool: DecoderPool) -> None:
    with FrameStream.open(path, index_path, wanted, LIMITS, pool=pool) as stream:
        for _ in stream:
            pass


def _keep(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(path.read_bytes())


def small_files(folder: Path) -> list[Path]:
    """A file of two seconds in each container that this build of FFmpeg can write."""
    files = []
    for suffix, codec in CONTAINERS.items():
        path = folder / f"sample{suffix}"
        try:
            files.append(write_video(path, fps=10.0, width=64, height=48, codec=codec))
        except (OSError, ValueError) as error:
            print(f"{suffix} is left out: {error}")
    return files


async def fuzz(files: Sequence[Path], seconds: float, seed: int, *, keep: Path) -> Counter[str]:
    """Rounds until time is up; returns how often each outcome came."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    sources = [(path, path.read_bytes()) for path in files]
    pool = DecoderPool(1)
    pool.start()
    end = time.monotonic() + seconds
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            while time.monotonic() < end:
                source, data = rng.choice(sources)
                path = Path(name) / f"mutated{source.suffix}"
                path.write_bytes(mutate(data, rng))
                try:
                    outcome = await outcome_of(path, Path(name) / "index.npz", pool)
                except Exception as error:
                    outcome = f"FINDING: {type(error).__name__}"
                    kept = keep / f"{seed}-{found.total()}{source.suffix}"
                    _keep(path, kept)
                    print(f"{kept}: {error!r}", flush=True)
                found[outcome] += 1
    finally:
        pool.close()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if anything but a decoder or its file failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.fuzz_decoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", nargs="*", type=Path, help="files to start from")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (600)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations (1)")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where findings go")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-samples-") as name:
        files = options.videos or small_files(Path(name))
        found = asyncio.run(fuzz(files, options.seconds, options.seed, keep=options.keep))
    print(f"{found.total()} files in {options.seconds:g} s, seed {options.seed}:")
    for outcome, count in found.most_common():
        print(f"  {count:6d}  {outcome}")
    return int(any(outcome.startswith("FINDING") for outcome in found))


if __name__ == "__main__":
    sys.exit(main())
