"""What subgroups bring on this machine: short prefixes side by side, and one before a long one.

    python -m benchmarks.parallel.subgroups [--rounds 5] [--ranks 2]

One rank group with a tiny random checkpoint. In alternating rounds it computes short prefixes, of
less than one chunk, one after the other on all ranks and side by side on one rank each; and a short
one that comes while a long one runs, inside its pause and after its end. Prints each round's wall
clock and the medians of the ratios; what the long one takes alone is what both took one after the
other, without a short one's share of those in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.messages import PrefillTask, Progress
from prefill_service.engine.spans import Stage
from prefill_service.kv.manifest import Manifest, hash_token_ids
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.video.indexer import index_video
from tools.make_tiny_checkpoint import build
from tools.make_video import write_video

NEVER = 1 << 30
EACH = 4
"""Short prefixes of a round, for each rank."""


class Work:
    """A group and one video, of which prefixes of any number of frames can be computed."""

    def __init__(
        self, group: PrefillExecutor, planner: PrefixPlanner, video: Path, index: Path
    ) -> None:
        self.group = group
        self.planner = planner
        self.video = video
        self.index = index
        self.plans: dict[int, PrefixPlan] = {}

    async def plan(self, frames: int) -> PrefixPlan:
        """Of so many frames."""
        index = await index_video(self.video, VideoConfig())
        index.save(self.index)
        sampling = FrameSampling(num_frames=frames)
        plan = self.plans[frames] = self.planner.plan(index, self.video.name, sampling, "")
        return plan

    def task(self, frames: int, subgroup: Subgroup) -> PrefillTask:
        """A prefix as if nobody had asked for it yet."""
        job_id = f"job_{uuid.uuid4().hex}"
        plan = replace(self.plans[frames], prefix_id=job_id)
        group = self.group
        manifest = Manifest(
            prefix_id=plan.prefix_id,
            engine_id="benchmark",
            epoch=group.supervisor.epoch,
            model_fingerprint=self.planner.checkpoint.fingerprint,
            layout=group.kv_layout,
            num_tokens=plan.num_tokens,
            runs=group.shard_map(plan, group.exchange_of(subgroup), subgroup),
            endpoints=group.supervisor.endpoints,
            token_ids_hash=hash_token_ids(plan.token_ids),
            position_delta=plan.position_delta,
        )
        return PrefillTask(
            job_id=job_id,
            plan=plan,
            manifest=manifest,
            video_path=str(self.video),
            index_path=str(self.index),
            subgroup=subgroup,
            exchange=group.exchange_of(subgroup),
        )

    async def run(self, task: PrefillTask, over: str = "") -> float:
        """Seconds from now to its end."""
        start = time.perf_counter()
        await self.group.prefill(task, lambda progress: None, over)
        self.group.drop_prefix(task.plan.prefix_id)
        return time.perf_counter() - start

    async def several(self, frames: int, subgroup: Subgroup, count: int) -> None:
        """One after the other."""
        for _ in range(count):
            await self.run(self.task(frames, subgroup))

    async def side_by_side(self, frames: int, count: int) -> None:
        """So many on each rank at the same time."""
        alone = [subgroup for subgroup in self.group.subgroups if subgroup.size == 1]
        await asyncio.gather(*(self.several(frames, subgroup, count) for subgroup in alone))

    async def behind(self, long: int, short: int, overtake: bool) -> tuple[float, float]:
        """Seconds of a short one that comes when a long one has begun to compute, and of that."""
        begun = asyncio.Event()

        def on_progress(progress: Progress) -> None:
            if progress.stage is Stage.PREFILL:
                begun.set()

        outer = self.task(long, self.group.all_ranks)
        start = time.perf_counter()
        job = asyncio.create_task(self.group.prefill(outer, on_progress))
        await begun.wait()
        inner = self.task(short, self.group.all_ranks)
        seconds = await self.run(inner, outer.job_id if overtake else "")
        await job
        self.group.drop_prefix(outer.plan.prefix_id)
        return seconds, time.perf_counter() - start


async def measure(ranks: int, rounds: int, folder: Path) -> None:
    """Start, warm up, measure, print."""
    model = build("qwen3_vl", folder / "model")
    video = folder / "video.mp4"
    write_video(video, seconds=60, fps=10, width=320, height=240)
    checkpoint = open_checkpoint(str(model))
    config = EngineConfig(
        model=str(model),
        ranks=ranks,
        device="cpu",
        threads_per_rank=1,
        sparse_from_tokens=NEVER,
        heartbeat_timeout_s=120.0,
    )
    group = PrefillExecutor(
        config, VideoConfig(), checkpoint, "float32", device="cpu", runtime_dir=folder / "run"
    )
    await group.supervisor.start()
    try:
        work = Work(group, PrefixPlanner(checkpoint, "float32"), video, folder / "index.npz")
        short = await work.plan(4)
        long = await work.plan(256)
        print(f"{ranks} ranks; prefixes of {short.num_tokens} and {long.num_tokens} tokens")
        await work.several(4, group.all_ranks, 2)
        await work.side_by_side(4, 1)
        gains = []
        waits = []
        later = []
        for number in range(1, rounds + 1):
            start = time.perf_counter()
            await work.several(4, group.all_ranks, EACH * ranks)
            in_turn = time.perf_counter() - start
            start = time.perf_counter()
            await work.side_by_side(4, EACH)
            together = time.perf_counter() - start
            # The short one that waits is over after the long one: its time is the long one's, too.
            waited, both = await work.behind(256, 4, False)
            inside, paused = await work.behind(256, 4, True)
            alone = both - in_turn / (EACH * ranks)
            gains.append(in_turn / together)
            waits.append(waited / inside)
            later.append(paused / alone - 1)
            print(
                f"round {number}: {EACH * ranks} short ones in turn {in_turn:.2f} s, side by side "
                f"{together:.2f} s; one behind a long one {waited:.2f} s, inside its pause "
                f"{inside:.2f} s, which then takes {paused:.2f} s instead of {alone:.2f}"
            )
        print(
            f"medians: side by side {statistics.median(gains):.1f} times the throughput; the short "
            f"one ends {statistics.median(waits):.1f} times sooner, the long one "
            f"{statistics.median(later):.0%} later; load {os.getloadavg()[0]:.0f} "
            f"on {os.cpu_count()} cores"
        )
    finally:
        await group.supervisor.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel.subgroups")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="subgroups-", dir="/tmp") as folder:
        asyncio.run(measure(options.ranks, options.rounds, Path(folder)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
