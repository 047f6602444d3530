"""What the exchanges move where attention is sparse, by quality: bytes, density, the same KV.

    python -m benchmarks.parallel.sparse [--ranks 4] [--tokens 4000]

Real ranks and the trained demo model; a video with needles. Every exchange that lets attention be
sparse computes the same prefix at every quality. The KV of all must be that of ``gather`` to
rounding, or the exit status is 1. Bytes are those of the ranks' meters, all ranks together, without
agreements.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.parallel.group import Case, Prefix, prefill_video
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.config import EngineConfig
from prefill_service.parallel.exchanges.catalog import EXCHANGES
from tools.needle import stories, videos

MODEL = Path(__file__).parents[2] / "assets" / "needle-qwen3-vl"
KINDS = tuple(kind for kind in EXCHANGES if kind.sparse)
QUALITIES = (Quality.EXACT, Quality.HIGH, Quality.BALANCED, Quality.FAST)
CHUNK = 512
SPARSE_FROM = 1024
_TOKENS_PER_PATCH = 15.6  # timestamp included
LIMIT = 1e-4
"""Relative error of KV against that of ``gather`` at the same quality."""


def row(case: Case, prefix: Prefix, gathered: Prefix) -> dict[str, Any]:
    """One case beside ``gather`` at its quality."""
    wanted = gathered.kv.double()
    uses = prefix.outcome.communication
    return {
        "quality": str(case.policy.quality),
        "exchange": str(case.kind),
        "density": round(prefix.outcome.attention.density, 3),
        "mb": round(prefix.outcome.bytes_received / 1e6, 2),
        "of_gather": round(prefix.outcome.bytes_received / gathered.outcome.bytes_received, 2),
        "by_collective_mb": {
            name: round(use.bytes_received / 1e6, 2)
            for name, use in sorted(uses.items())
            if use.bytes_received >= 5000 and name != "agree"
        },
        "error": float((prefix.kv.double() - wanted).norm() / wanted.norm()),
    }


def measure(
    ranks: int, tokens: int, qualities: Sequence[Quality], folder: Path
) -> list[dict[str, Any]]:
    """A row per quality and exchange."""
    story = stories.sample_story(round(tokens / _TOKENS_PER_PATCH), np.random.default_rng(1))
    video = videos.write_mp4(folder / "video.mp4", story, seed=1)
    cases = [Case(kind, resolve_policy(quality)) for quality in qualities for kind in KINDS]
    config = EngineConfig(
        model=str(MODEL),
        ranks=ranks,
        device="cpu",
        dtype="float32",
        threads_per_rank=1,
        chunk_tokens=CHUNK,
        sparse_from_tokens=SPARSE_FROM,
    )
    found = asyncio.run(prefill_video(config, video, folder, cases=cases, fps=videos.SAMPLED_FPS))
    print(
        f"{found[0].kv.shape[2]} tokens on {ranks} ranks, chunks of {CHUNK} tokens a rank, "
        f"sparse from {SPARSE_FROM} keys on"
    )
    gathered = [found[i - i % len(KINDS)] for i in range(len(found))]
    return [row(*one) for one in zip(cases, found, gathered, strict=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if some exchange gives another prefix."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel.sparse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4000, help="about so many (%(default)s)")
    parser.add_argument("--quality", nargs="+", type=Quality, default=QUALITIES)
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "sp-sparse.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sparse-", dir="/tmp") as folder:
        rows = measure(options.ranks, options.tokens, options.quality, Path(folder))
    print(tables.markdown(list(rows[0]), [list(one.values()) for one in rows]))
    about = tables.settings(
        ranks=options.ranks,
        tokens=options.tokens,
        chunk=CHUNK,
        sparse_from_tokens=SPARSE_FROM,
        model=MODEL.name,
    )
    tables.write(options.out, {"settings": about, "rows": rows})
    wrong = [one for one in rows if not one["error"] <= LIMIT]
    if wrong:
        print(f"other KV than that of gather: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
