"""The fidelity suite runs, its prefill is the ranks', and a slice of its table holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quality.fidelity import adversarial, results, variable_rate
from benchmarks.quality.fidelity.scoring import Asked, Reader, Setting, fresh_video
from prefill_service.config import VideoConfig
from prefill_service.engine.messages import BaselineTask
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.parallel.baselines.methods import BaselineName, baseline_method
from prefill_service.video.decoder.indexing import build_index
from tests.support.standalone_executor import standalone_executor
from tools.needle import stories, videos

ASSET = Path(__file__).resolve().parents[2] / "assets" / "needle-qwen3-vl"
KEYS = {
    "task", "temporal_patches", "video_tokens", "quality", "ranks", "questions", "accuracy",
    "accuracy_exact", "agreement_with_exact", "kept_mass", "kept_mass_certified", "density",
}  # fmt: skip


@pytest.mark.parametrize(("quality", "ranks"), [("exact", 1), ("balanced", 2)])
async def test_a_rehearsal_is_what_the_ranks_do(tmp_path: Path, quality: str, ranks: int) -> None:
    patches = 70
    setting = Setting(quality, ranks)
    story = stories.sample_story(patches, np.random.default_rng(4))
    path = videos.write_mp4(tmp_path / "a.mp4", story, seed=4)
    async with standalone_executor(
        ASSET, tmp_path, ranks, chunk_tokens=200, sparse_from_tokens=400
    ) as standalone:
        plan, _ = await standalone.plan(path, FrameSampling())
        task = standalone.task(path, plan, policy=setting.policy)
        outcome = await standalone.prefill(task)
        served = standalone.read_kv(task)  # [layers, 2, tokens, kv_heads, head_dim]
    reader = Reader(ASSET, sparse_from=400, chunk_tokens=200)
    done = reader.prefill(reader.prefix(videos.read_frames(path)), setting)
    rehearsed = torch.stack(done.kv).transpose(2, 3)
    assert (rehearsed - served).norm() / served.norm() < 1e-4
    assert done.report.density == pytest.approx(outcome.attention.density, abs=0.01)
    assert (done.report.density < 0.95) == (quality != "exact")


def test_the_plan_of_a_constant_rate_is_the_readers_own_prefix(tmp_path: Path) -> None:
    story = stories.sample_story(18, np.random.default_rng(4))
    path = videos.write_mp4(tmp_path / "a.mp4", story, seed=4)
    index = build_index(str(path), VideoConfig())
    planner = PrefixPlanner(open_checkpoint(str(ASSET)), "float32")
    plan = planner.plan(index, "", FrameSampling(num_frames=36), "")
    reader = Reader(ASSET)
    frames = variable_rate.read(path, plan)
    own = reader.prefix(frames)
    planned = variable_rate.planned_prefix(reader, frames, plan)
    assert planned.token_ids.tolist() == own.token_ids.tolist()
    assert np.array_equal(planned.position_ids, own.position_ids)
    assert np.array_equal(planned.patch_ends, own.patch_ends)


def test_variable_rates_are_measured_by_frame_and_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variable_rate, "PATCHES", 18)
    out = tmp_path / "sampling.json"
    variable_rate.main(["--videos", "1", "--questions", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["by"]) for row in rows] == [
        (kind, by) for kind in variable_rate.KINDS for by in ("FRAME", "TIME")
    ]
    for by_frame, by_time in zip(rows[::2], rows[1::2], strict=True):
        assert by_time["stamps_off_s"] == 0
        assert (by_frame["stamps_off_s"] > 0.5) == (by_frame["kind"] != "constant, 10 fps")
        assert by_frame["frames"] == by_time["frames"] == 36


async def test_a_published_method_is_what_the_ranks_do(tmp_path: Path) -> None:
    """APB, whose later ranks have the question twice; and with all passing, what is exact."""
    patches = 40
    ranks = 2
    story = stories.sample_story(patches, np.random.default_rng(4))
    path = videos.write_mp4(tmp_path / "a.mp4", story, seed=4)
    reader = Reader(ASSET)
    prefix = reader.prefix(videos.read_frames(path))
    tokens = len(prefix.token_ids)
    text = "What color is the ring?"
    method = baseline_method(BaselineName.APB, tokens, ranks)
    async with standalone_executor(ASSET, tmp_path, ranks, chunk_tokens=200) as standalone:
        plan, _ = await standalone.plan(path, FrameSampling())
        how = BaselineTask(method, tuple(reader.turn(text)))
        task = standalone.task(path, plan, baseline=how)
        await standalone.prefill(task)
        served = standalone.read_kv(task)  # [layers, 2, tokens, kv_heads, head_dim]
    ours = torch.stack(reader.published(prefix, method, ranks, text)).transpose(2, 3)
    assert (ours - served).norm() / served.norm() < 1e-4

    every = baseline_method(BaselineName.SPAVA, tokens, 3, passing_tokens=tokens)
    exact = torch.stack(reader.prefill(prefix, Setting("exact")).kv)
    spava = torch.stack(reader.published(prefix, every, 3, text))
    assert (spava - exact).norm() / exact.norm() < 1e-5
    assert (ours.transpose(2, 3) - exact).norm() / exact.norm() > 1e-2


def test_a_slice_of_the_table(tmp_path: Path) -> None:
    """New videos, another seed: retrieval survives the default quality."""
    out = tmp_path / "fidelity.json"
    command = [sys.executable, "-m", "benchmarks.quality.fidelity", "--checkpoint", str(ASSET)]
    command += ["--patches", "64", "192", "--videos", "3", "--seed", "77", "--questions", "4"]
    command += ["--ranks", "1", "--sweep", "0.5", "--workers", "2", "--out", str(out)]
    command += ["--no-service", "--no-adversarial", "--published", "star"]
    command += ["--published-patches", "64", "--published-videos", "2"]
    root = ASSET.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    meta = json.loads(out.with_suffix(".meta.json").read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert all(row.keys() >= KEYS for row in rows)
    pooled = {
        (row["temporal_patches"], row["quality"]): row
        for row in rows
        if row["task"] == "all" and (row["ranks"] == 1) == (row["quality"] != "star")
    }
    assert len(pooled) == 2 * 5 + 1
    assert pooled[64, "star"]["ranks"] == 4
    assert pooled[64, "star"]["questions"] >= 20
    assert pooled[64, "star"]["kept_mass"] is pooled[64, "star"]["density"] is None
    for patches in (64, 192):
        exact = pooled[patches, "exact"]
        balanced = pooled[patches, "balanced"]
        assert exact["questions"] >= 36
        assert exact["agreement_with_exact"] == 1
        assert exact["density"] == 1
        assert exact["accuracy"] >= 0.85
        assert balanced["agreement_with_exact"] >= 0.9
        assert balanced["kept_mass"] == pytest.approx(balanced["kept_mass_certified"], abs=0.02)
        assert pooled[patches, "epsilon=0.5"]["density"] <= balanced["density"]
    assert pooled[192, "balanced"]["density"] < pooled[64, "balanced"]["density"] < 1
    assert {loss["quality"] for loss in meta["losses"]} == {
        "exact",
        "high",
        "balanced",
        "fast",
        "epsilon=0.5",
        "star",
    }
    assert "points of accuracy lost" in done.stdout


def test_losses_and_intervals() -> None:
    def asked(quality: str, right: list[bool], patches: int = 64) -> Asked:
        tasks = [index % 4 for index in range(len(right))]
        sure = [True] * len(right)
        return Asked(
            setting=Setting(quality),
            video=3,
            patches=patches,
            tokens=955,
            tasks=tasks,
            right=right,
            same=right,
            sure=sure,
            density=0.5,
            certified=None,
            true_mass=None,
            floor_met=True,
        )

    many = [asked("exact", [True] * 4), asked("exact", [True] * 4, 128)]
    many += [asked("fast", [True, True, True, False]), asked("fast", [True] * 4, 128)]
    exact, fast = results.losses(many)
    assert (exact["points_lost"], exact["low"], exact["high"]) == (0, 0, 0)
    assert fast["points_lost"] == 12.5
    assert (fast["low"], fast["high"]) == (0, 25)
    assert (fast["worst_cell"], fast["worst_points_lost"]) == ("count at 64", 100)
    rows = {(r["quality"], r["temporal_patches"], r["task"]): r for r in results.rows_of(many)}
    assert rows["fast", 64, "all"]["accuracy"] == 0.75
    assert rows["fast", 64, "all"]["accuracy_exact"] == 1
    assert rows["fast", 64, "count"]["questions"] == 1
    low, high = results.wilson(300, 300)
    assert (round(low, 3), high) == (0.987, pytest.approx(1))
    assert results.wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("case", adversarial.CASES)
def test_adversarial_videos_are_what_they_say(case: str) -> None:
    for seed in range(5):
        story, questions, look = adversarial.CASES[case](np.random.default_rng(seed))
        shown = sorted(p for needle in story.needles for p in needle.patches)
        assert len(set(shown)) == len(shown)
        assert questions
        for question in questions:
            assert question.answer
        if case == "first and last patch":
            assert shown == [0, adversarial.PATCHES - 1]
        if case == "two in one block":
            assert shown[1] - shown[0] == 1
        if case == "at chunk borders of two ranks":
            assert all(p % 64 in (63, 0) for p in shown)
        if case == "twice, and asked twice":
            assert questions[0] == questions[1]
            assert [q.answer for q in questions if q.task == "count"] == ["2"]
        assert (look.frames == 1) == (case == "one frame only")


def test_silent_failures_are_counted() -> None:
    def asked(quality: str, same: list[bool], floor_met: bool) -> Asked:
        tasks = [0] * 4
        sure = [True, True, False, True]
        right = [True, True, True, False] if quality == "exact" else same
        return Asked(
            setting=Setting(quality),
            video=3,
            patches=64,
            tokens=955,
            tasks=tasks,
            right=right,
            same=same,
            sure=sure,
            density=0.5,
            certified=0.9,
            true_mass=None,
            floor_met=floor_met,
        )

    many = [asked(quality, [True] * 4, True) for quality in ("exact", "high")]
    many += [
        asked("balanced", [True, False, False, False], True),
        asked("fast", [False] * 4, False),
    ]
    rows = {row["quality"]: row for row in adversarial.rows("case", many)}
    silent = {quality: row["silent_failures"] for quality, row in rows.items()}
    assert silent == {"exact": 0, "high": 0, "balanced": 3, "fast": 0}
    assert rows["balanced"]["sure"] == 2
    assert rows["balanced"]["sure_and_right"] == 1


def test_fresh_videos_are_reproducible() -> None:
    frames, questions = fresh_video(20, 4, 5)
    again, same = fresh_video(20, 4, 5)
    assert np.array_equal(frames, again)
    assert questions == same
    assert len(set(questions)) == len(questions)
    assert [sum(q.task == task for q in questions) for task in stories.TASKS] == [4, 4, 4, 2]
