"""Needle videos of variable frame rate, sampled by frame and by time: which is answered better?

    python -m benchmarks.quality.fidelity.variable_rate

Files are indexed, planned and decoded as the service does; the prefill is exact. A file is a story
of a minute whose frames come at some rate in each of its thirds, the order of the thirds shuffled.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks import tables
from benchmarks.processes import end_on_sigterm
from benchmarks.quality.fidelity.rehearsal import Prefix
from benchmarks.quality.fidelity.results import wilson
from benchmarks.quality.fidelity.scoring import Reader, Setting
from prefill_service.config import VideoConfig
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan, SampleBy
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.index import VideoIndex
from tools.needle import stories, videos
from tools.needle.stories import Story

CHECKPOINT = Path("assets/needle-qwen3-vl")
PATCHES = 66
RENDERED_FPS = 30
# Frames per second in each third of a story: a divisor of RENDERED_FPS.
KINDS = {
    "constant, 10 fps": (10, 10, 10),
    "phone, 30 to 15 fps": (30, 15, 30),
    "camera, 30 to 5 fps": (30, 10, 5),
    "screen recording, 30 to 1 fps": (30, 1, 1),
}


@dataclass(frozen=True, slots=True)
class Filmed:
    """A story in a file.

    Attributes:
        path: of the file.
        seconds: [frames] when each is shown, as it was written.
    """

    path: Path
    seconds: np.ndarray


def film(path: Path, story: Story, seed: int, rates: tuple[int, ...]) -> Filmed:
    """Write a story's frames at these rates, one for each of equal parts."""
    rng = np.random.default_rng(seed)
    part_frames = story.patches * RENDERED_FPS // len(rates)
    strides = RENDERED_FPS // np.repeat(rng.permutation(rates), part_frames)
    kept = np.flatnonzero(np.arange(len(strides)) % strides == 0)
    shown = set(kept.tolist())
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=RENDERED_FPS, options={"preset": "veryfast"})
        stream.width = videos.SIDE
        stream.height = videos.SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(videos.render(story, rng, RENDERED_FPS)):
            if number not in shown:
                continue
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, RENDERED_FPS)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return Filmed(path, kept / RENDERED_FPS)


def read(path: Path, plan: PrefixPlan) -> np.ndarray:
    """The planned frames, in whole pairs: [frames, SIDE, SIDE, 3] uint8."""
    frames = videos.read_frames(path)[plan.frame_indices]
    odd = frames[-1:] if len(frames) % 2 else frames[:0]
    return np.concatenate([frames, odd])


def planned_prefix(reader: Reader, frames: np.ndarray, plan: PrefixPlan) -> Prefix:
    """The plan's tokens and positions, with the features of its frames."""
    seen = reader.prefix(frames)
    return Prefix(
        token_ids=plan.token_ids,
        position_ids=plan.position_ids,
        patch_ends=plan.patch_ends,
        video_token_id=plan.video_token_id,
        features=seen.features,
        patch_tokens=seen.patch_tokens,
    )


def stamps_off(index: VideoIndex, plan: PrefixPlan, by: SampleBy) -> float:
    """Most seconds that a sampled frame's stamp is off the time it is shown at."""
    stamps = plan.frame_seconds
    if by is SampleBy.FRAME:
        stamps = plan.frame_indices / index.fps
    ends = np.append(index.times_s[1:], index.duration_s)[plan.frame_indices]
    early = index.times_s[plan.frame_indices] - stamps
    return float(np.maximum(np.maximum(early, stamps - ends), 0.0).max())


def ask_videos(
    reader: Reader, planner: PrefixPlanner, kind: str, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row of every video of a kind and each way of sampling."""
    for number in range(options.videos):
        seed = options.seed * 1000 + number
        rng = np.random.default_rng((seed, PATCHES))
        story = stories.sample_story(PATCHES, rng)
        questions = stories.distinct_questions(story, options.questions, rng)
        with tempfile.TemporaryDirectory() as folder:
            filmed = film(Path(folder) / "story.mkv", story, seed, KINDS[kind])
            index = build_index(str(filmed.path), VideoConfig())
            np.testing.assert_allclose(index.times_s, filmed.seconds, atol=0.002)
            for by in SampleBy:
                plan = planner.plan(index, "", FrameSampling(num_frames=2 * PATCHES, by=by), "")
                prefix = planned_prefix(reader, read(filmed.path, plan), plan)
                done = reader.prefill(prefix, Setting("exact"))
                words, _ = reader.answers(prefix, done.kv, [one.text for one in questions])
                yield {
                    "kind": kind,
                    "by": by.value,
                    "right": [w == q.answer for w, q in zip(words, questions, strict=True)],
                    "frames": len(plan.frame_indices),
                    "stamps_off_s": stamps_off(index, plan, by),
                }


def summarize(kind: str, by: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the result."""
    right = [flag for one in found for flag in one["right"]]
    low, high = wilson(sum(right), len(right))
    return {
        "kind": kind,
        "by": by,
        "videos": len(found),
        "questions": len(right),
        "accuracy": round(float(np.mean(right)), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "frames": round(float(np.mean([one["frames"] for one in found])), 1),
        "stamps_off_s": round(float(np.mean([one["stamps_off_s"] for one in found])), 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--videos", type=int, default=24, help="of each kind")
    parser.add_argument("--questions", type=int, default=3, help="of each task, per video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=tables.RESULTS / "sampling.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    reader = Reader(options.checkpoint)
    planner = PrefixPlanner(open_checkpoint(str(options.checkpoint)), "float32")
    rows = []
    for kind in KINDS:
        found = list(ask_videos(reader, planner, kind, options))
        for by in SampleBy:
            rows.append(summarize(kind, by.value, [one for one in found if one["by"] == by]))
            print(rows[-1], flush=True)
    header = tables.settings(checkpoint=str(options.checkpoint), seed=options.seed, patches=PATCHES)
    tables.write(options.out, {"settings": header, "rows": rows})


if __name__ == "__main__":
    end_on_sigterm()
    main()
