"""``prefill-service calibrate`` on a tiny model: its budgets, used by the ranks, holds its word."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefill_service.attention.head_budgets import HeadBudgets, load_head_budgets
from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings
from prefill_service.calibration.encoded_video import encode_video, plan_video
from prefill_service.calibration.local_prefill import LocalPrefill
from prefill_service.cli.main import main
from prefill_service.config import EngineConfig, ServiceConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.service import build_components
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

EPSILON = 0.7
FPS = 4.0
SIZES = ["--sparse-from-tokens", "400", "--chunk-tokens", "200", "--fps", str(FPS)]


@pytest.fixture(scope="module")
def video(make_video: Callable[..., Path]) -> Path:
    return make_video(seconds=40.0, fps=10, width=160, height=120)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3_vl")


@pytest.fixture(scope="module")
def budgets_file(model: Path, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "budgets.json"
    arguments = ["--model", str(model), "--videos", str(video), "--epsilon", str(EPSILON)]
    assert main(["calibrate", *arguments, "--out", str(out), *SIZES]) == 0
    return out


def load(path: Path, model: Path) -> HeadBudgets:
    checkpoint = open_checkpoint(str(model))
    return load_head_budgets(
        path,
        checkpoint.fingerprint,
        shape=(checkpoint.shape.attending_layers, checkpoint.shape.kv_heads),
    )


async def prefill(
    standalone: StandaloneExecutor, video: Path, policy: AttentionPolicy
) -> tuple[list[LayerReport], torch.Tensor]:
    """By a rank: its report, and KV [layers, 2, tokens, kv_heads, head_dim]."""
    plan, _ = await standalone.plan(video, FrameSampling(fps=FPS))
    plan = replace(plan, prefix_id=f"pfx_{policy.attention_key}")
    task = standalone.task(video, plan, policy=policy)
    layers = (await standalone.prefill(task)).attention.layers
    return layers, standalone.read_kv(task)


class InProcess:
    """The calibration's own prefills of the same video."""

    def __init__(self, model: Path, video: Path, folder: Path) -> None:
        checkpoint = open_checkpoint(str(model))
        self._model = PrefillModel(checkpoint, torch.float32, torch.device("cpu"))
        planner = PrefixPlanner(checkpoint, "float32")
        planned = plan_video(video, planner, FrameSampling(fps=FPS), 400)
        self._video = encode_video(planned, self._model, 200, folder)

    def prefill(
        self, policy: AttentionPolicy, only: int | None = None
    ) -> tuple[list[LayerReport], torch.Tensor]:
        """Report and KV, as of the ranks."""
        settings = SparseSettings(400)
        run = LocalPrefill(self._model, self._video, settings, policy, only=only, keep=True)
        return run.run(), torch.stack(run.pages).transpose(1, 2)


def worst(layers: list[LayerReport]) -> float:
    """Kept mass of the worst query head."""
    mass = np.array([layer.head_mass for layer in layers])  # [layers, q_heads]
    rows = np.array([layer.kept_mass.count / mass.shape[1] for layer in layers])
    return float((mass / rows[:, None]).min())


async def test_the_ranks_attend_no_more_and_the_worst_head_does_not_fall(
    model: Path, video: Path, budgets_file: Path, tmp_path: Path
) -> None:
    budgets = load(budgets_file, model)
    assert budgets.epsilon == EPSILON
    assert len({value for row in budgets.head_epsilons for value in row}) > 1
    assert len(budgets.layer_sensitivity) == budgets.shape[0]
    assert min(budgets.layer_sensitivity) > 0
    uniform = AttentionPolicy(Quality.CUSTOM, EPSILON, 0.0)
    async with standalone_executor(
        model, tmp_path, 1, chunk_tokens=200, sparse_from_tokens=400
    ) as standalone:
        before, _ = await prefill(standalone, video, uniform)
        after, kv = await prefill(standalone, video, uniform.with_budgets(budgets))
        exact, _ = await prefill(
            standalone, video, resolve_policy(Quality.EXACT).with_budgets(budgets)
        )
    spent, budget = (sum(sum(layer.attended) for layer in layers) for layers in (after, before))
    assert 0.95 * budget <= spent <= budget
    assert worst(after) > worst(before)
    assert all(layer.density == 1 for layer in exact)
    # What was calibrated is what the ranks do.
    prefills = await asyncio.to_thread(InProcess, model, video, tmp_path)
    layers, ours = prefills.prefill(uniform.with_budgets(budgets))
    assert [layer.attended for layer in layers] == [layer.attended for layer in after]
    assert [layer.head_mass for layer in layers] == [
        pytest.approx(layer.head_mass, abs=1e-3) for layer in after
    ]
    assert ((ours - kv).norm() / kv.norm()).item() < 1e-5


def test_one_layer_alone_is_approximated(model: Path, video: Path, tmp_path: Path) -> None:
    prefills = InProcess(model, video, tmp_path)
    _, exact = prefills.prefill(resolve_policy(Quality.EXACT))
    policy = AttentionPolicy(Quality.CUSTOM, 2 * EPSILON, 0.0)
    for layer in range(len(exact) - 1):
        reports, kv = prefills.prefill(policy, only=layer)
        assert torch.equal(kv[: layer + 1], exact[: layer + 1])
        assert (kv[layer + 1 :] != exact[layer + 1 :]).any()
        assert [bool(report.head_mass) for report in reports] == [
            number == layer for number in range(len(reports))
        ]


def test_check_prints_what_the_budgets_do(
    model: Path, video: Path, budgets_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model), "--videos", str(video), "--check", str(budgets_file)]
    assert main(["calibrate", *arguments, *SIZES]) == 0
    printed = capsys.readouterr()
    last = printed.out.splitlines()[-1]
    before, after = (
        float(part) for part in last.split("kept mass ")[1].split(",")[0].split(" -> ")
    )
    assert after >= before
    assert 0.95 <= float(last.split("attended keys ")[1].split()[0]) <= 1
    assert f"the budgets: {video.name}" in printed.err


def config(model: Path, path: Path) -> ServiceConfig:
    return ServiceConfig(
        engine=EngineConfig(model=str(model), device="cpu", head_budgets=str(path))
    )


def test_the_service_takes_budgets_of_its_model_only(
    model: Path, budgets_file: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    parts = build_components(config(model, budgets_file), tmp_path, tmp_path)
    assert parts.budgets == load(budgets_file, model)
    with pytest.raises(ServiceError, match="was made for the model") as error:
        build_components(config(checkpoint("qwen3_vl", seed=1), budgets_file), tmp_path, tmp_path)
    assert error.value.reason is Reason.CONFIG_INVALID
    fewer = json.loads(budgets_file.read_text())
    fewer["head_epsilons"].pop()
    fewer["layer_sensitivity"].pop()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(fewer))
    layers = len(fewer["head_epsilons"])
    with pytest.raises(ServiceError, match=f"has {layers} layers .* expected {layers + 1} of"):
        build_components(config(model, other), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--videos", "nothing.mp4", "--out", "p.json"], 1, "nothing.mp4: no such file"),
        (["--videos", "text.mp4", "--out", "p.json"], 1, "text.mp4: "),
        (
            ["--videos", "v.mp4", "--out", "p.json", "--sparse-from-tokens", "9000"],
            1,
            "too short to be sparse, which begins at 9000 tokens",
        ),
        (
            ["--videos", "v.mp4", "--out", "p.json", "--epsilon", "1"],
            2,
            "--epsilon 1.0 is not accepted; expected more than 0 and at most 0.95",
        ),
        (["--videos", "v.mp4", "--out", "no/p.json"], 2, "--out no/p.json is not accepted"),
        (["--videos", "v.mp4", "--out", "p.json", "--rows", "0"], 2, "--rows 0 is not accepted"),
        (["--videos", "v.mp4", "--check", "p.json"], 2, "--check: p.json cannot be read: No such"),
        (["--videos", "v.mp4"], 2, "one of the arguments --out --check is required"),
        (
            ["--videos", "v.mp4", "--out", "p.json", "--fps", "2", "--num-frames", "8"],
            1,
            "v.mp4: fps and num_frames exclude each other",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_one_line(
    model: Path,
    video: Path,
    arguments: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, "v.mp4")
    Path("text.mp4").write_text("not a video " * 100)
    try:
        got: Any = main(["calibrate", "--model", str(model), *arguments])
    except SystemExit as exit_:
        got = exit_.code
    error = capsys.readouterr().err
    assert got == code
    assert text in error
    assert error.count("\n") == 1
    assert not Path("p.json").exists()


def test_ctrl_c_leaves_nothing(model: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    command = [sys.executable, "-m", "prefill_service.cli.main", "calibrate", "--model", str(model)]
    # So many that it is not through before the signal comes.
    arguments = ["--videos", *[str(video)] * 9, "--out", str(out), *SIZES]
    with subprocess.Popen(
        [*command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epsilon"):
                break
        time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(20) == 130
    assert rest.endswith("prefill-service: interrupted, nothing was written\n")
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
