"""The GPU prefill benchmark as far as it goes without a GPU: rehearsed, and its parts alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from benchmarks.gpu.prefill import check, report
from benchmarks.gpu.prefill.__main__ import main
from benchmarks.gpu.prefill.cells import Budget, Cell, plan_cells
from benchmarks.gpu.prefill.device import Device
from benchmarks.gpu.prefill.inputs import SINKS, Frames, Heads, video_attention
from benchmarks.gpu.prefill.model import RandomModel
from benchmarks.gpu.prefill.runs import (
    DENSE,
    MODES,
    Run,
    Settings,
    Workload,
    prefill,
    torch_flash,
)
from benchmarks.gpu.prefill.shapes import QWEN3_8B, QWEN25_7B, SHAPES, TINY, PublishedModel
from prefill_service.attention.dense import Partial
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings

ROOT = Path(__file__).resolve().parents[2]
CPU = Device(torch.device("cpu"))
SETTINGS = Settings(64, 1 << 20, SparseSettings(128, 16, 32, segment_blocks=4))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert main(["--device", "cpu"]) == 2


def test_rehearsal(tmp_path: Path) -> None:
    result = tmp_path / "rehearsed.json"
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.gpu.prefill",
            "--device",
            "cpu",
            "--tiny",
            "--turns",
            "1",
            "--modes",
            "dense",
            "exact",
            "balanced",
            "--output",
            str(result),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    table = run.stdout.splitlines()[-18:]
    assert table[0].startswith("| model")
    # Two models, two lengths, three modes; and two whole models in two modes.
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert len(rows) == 2 * 2 * 3 + 2 * 2
    columns = table[0].replace(" ", "").split("|")[1:-1]
    for row in rows:
        found = dict(zip(columns, row, strict=True))
        assert float(found["tokens_per_s"]) > 0
        assert found["prefill_s"].startswith("~") == (found["layers"] == "3/5")
        assert found["speedup"] != "-"
    assert '"rows"' in result.read_text()


@pytest.mark.parametrize("shape", SHAPES)
def test_work_is_that_of_the_layers(shape: PublishedModel) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(shape.config(1))
    (layer,) = model.language_model.layers
    weights = {
        name: part.weight.numel()
        for name, part in layer.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    last = sum(weights[f"self_attn.{x}_proj"] for x in "qkv")
    assert shape.linear_flops(10, 1) == 20 * last
    assert shape.linear_flops(10, 3) == 20 * (2 * sum(weights.values()) + last)
    assert layer.self_attn.head_dim == shape.head_dim


@pytest.mark.parametrize("shape", SHAPES)
def test_plans_have_the_family_s_own_layout(shape: PublishedModel) -> None:
    plan = shape.plan(32768)
    video = plan.token_ids == plan.video_token_id
    assert plan.num_video_tokens == int(video.sum()) == 130 * 252
    assert plan.patch_ends[-1] == plan.num_tokens == plan.position_ids.shape[1]
    assert len(plan.patch_ends) == 130


def test_inputs_have_sinks_needles_and_a_scene() -> None:
    tokens = 768
    patch = 24
    dim = 32
    inputs = video_attention(
        Frames(tokens, patch), Heads(8, 2, dim), dtype=torch.float32, device=CPU.device
    )
    again = video_attention(
        Frames(tokens, patch), Heads(8, 2, dim), dtype=torch.float32, device=CPU.device
    )
    assert all(torch.equal(a, b) for a, b in zip(_parts(inputs), _parts(again), strict=True))
    position = torch.arange(tokens)
    causal = position <= position[:, None]
    scores = (inputs.q[0] @ inputs.k[0].T * dim**-0.5).masked_fill(~causal, -torch.inf)
    p = scores.softmax(-1)[tokens // 2 :]
    recent = position >= (position[tokens // 2 :, None] // patch - 1) * patch
    # A streaming head: what it wants are sinks and what was just seen (6 % of the keys).
    assert 0.1 < float(p[:, :SINKS].sum(-1).mean()) < 0.7
    assert float((p * recent).sum(-1).mean()) > 0.15
    with pytest.raises(ValueError, match="7 query heads are no multiple of 2"):
        Heads(7, 2, dim)


def _parts(inputs: object) -> list[Tensor]:
    return [getattr(inputs, name) for name in "qkv"]


@pytest.mark.parametrize("wrong", ["nothing", "scale", "merge", "raises"])
def test_check_finds_a_wrong_kernel(wrong: str) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> Partial:
        if wrong == "raises":
            raise RuntimeError("no such kernel")
        part = torch_flash(q, k, v, causal=causal, scale=scale * (1.01 if wrong == "scale" else 1))
        return Partial(part.out, part.lse + (0.1 if wrong == "merge" and causal else 0))

    rows = check.check(
        CPU,
        TINY[0],
        240,
        settings=SETTINGS,
        kernels={"flash": torch_flash, "mine": kernel},
        mlp_chunk_tokens=64,
    )
    found = {row["mode"]: row["ok"] for row in rows}
    assert found.pop("dense mine") == (wrong == "nothing")
    assert len(found) == len(MODES)
    assert all(found.values()), rows


def test_check_finds_a_verification_that_says_too_much() -> None:
    report_of_layer = LayerReport(0, [1.0])
    report_of_layer.output_error.add_values(torch.full((8,), 0.02))
    wanted = check.Wanted(torch.ones(2, 300, 4), torch.ones(300, 2, 1, 4))
    for off, fine in ((0.02, True), (0.1, False), (float("nan"), False)):
        run = Run(
            seconds=1.0,
            attention_s=0.5,
            reports=[report_of_layer],
            peak_bytes=None,
            attended=wanted.attended + off,
            stored={1: wanted.stored},
        )
        assert (
            check.compare(run, wanted, "balanced", dtype=torch.bfloat16, sparse_from=128)["ok"]
            == fine
        )


def test_lengths_are_left_out_from_the_longest_on() -> None:
    peak = 5e14
    groups = plan_cells(SHAPES, (262144, 32768, 524288), MODES, 3)
    assert [tokens for _, tokens in groups] == [32768, 32768, 262144, 262144, 524288, 524288]
    budget = Budget(45.0, peak)
    ran = []
    for (shape, tokens), cells in groups.items():
        if budget.allows(f"{shape.name}, {tokens}", cells):
            ran.append(tokens)
            for cell in cells:
                budget.measured(cell, cell.estimate_s(peak))
            budget.spend(budget.predict(cells))
    assert ran == [32768, 32768, 262144]
    assert len(budget.skipped) == 3
    # A machine twice as slow as was guessed.
    slow = Budget(60.0, peak)
    cell = Cell(shape=QWEN25_7B, video_tokens=131072, mode=DENSE, layers=3)
    before = slow.predict([cell])
    slow.measured(cell, 2 * cell.estimate_s(peak))
    assert slow.predict([cell]) > 1.8 * before


def test_whole_models_are_extrapolated_part_by_part() -> None:
    peak = 1e14
    tokens = 1000
    cell = Cell(shape=QWEN3_8B, video_tokens=tokens, mode=DENSE, layers=3)
    linear = QWEN3_8B.linear_flops(tokens, 3) / peak / 0.8
    dense = report.make_row(cell, tokens, Run(linear + 2.0, 2.0), peak)
    assert dense["linear_of_peak"] == pytest.approx(0.8)
    whole = QWEN3_8B.linear_flops(tokens, 36) / peak / 0.8
    assert dense["prefill_s"] == pytest.approx(whole + 35.0)  # one second a layer that attends
    pairs = 35 * tokens * (tokens + 1) / 2
    assert dense["mfu"] == pytest.approx(
        (whole * 0.8 * peak + 4 * 128 * 32 * pairs) / dense["prefill_s"] / peak
    )
    layer = LayerReport(0, [100.0] * 8, causal=200.0)
    layer.kept_mass.add_values(torch.tensor([0.96, 0.98]))
    layer.output_error.add_values(torch.tensor([0.1]))
    layer.select_s = 1.0
    layer.attend_s = 2.0
    layer.verify_s = 1.0
    layer.tiles = 8
    fast = report.make_row(
        Cell(shape=QWEN3_8B, video_tokens=tokens, mode="fast", layers=3),
        tokens,
        Run(linear + 1.0, 1.0, [layer]),
        peak,
    )
    assert (fast["density"], fast["kept_mass"], fast["attend"]) == (0.5, pytest.approx(0.97), 0.5)
    (bound,) = report.bounds([dense, fast])
    assert f"{1 + 35 / whole:.2f} times" in bound
    report.add_speedups([dense, fast])
    assert fast["speedup"] == pytest.approx((whole + 35) / (whole + 17.5))
    assert "1 times" not in "".join(report.targets([dense, fast]))


def test_pages_are_written_as_for_a_hand_off() -> None:
    shape = TINY[1]
    plan = shape.plan(240)
    model = RandomModel(shape, 3, torch.float32, device=CPU.device, mlp_chunk_tokens=64)
    inputs = video_attention(
        Frames(plan.num_tokens, 24),
        Heads(shape.heads, shape.kv_heads, shape.head_dim),
        dtype=torch.float32,
        device=CPU.device,
    )
    plain, paged = (
        prefill(
            CPU,
            Workload(model, plan, inputs),
            mode="exact",
            settings=SETTINGS,
            kernel=torch_flash,
            capture=True,
            pages=pages,
        )
        for pages in (False, True)
    )
    assert plain.attended is not None
    assert paged.attended is not None
    assert torch.equal(plain.attended, paged.attended)
    assert 0 < plain.attention_s < plain.seconds
