"""The GPU benchmark as far as it goes without a GPU: its arithmetic, refusal and dry run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.attention import add_peak, main
from benchmarks.gpu.attention_problem import Problem, Shape

ROOT = Path(__file__).resolve().parents[2]


def test_pairs_are_those_of_the_written_out_mask() -> None:
    shape = Shape(tokens=300, q_heads=6, kv_heads=2, head_dim=16, block=32, tile=48, chunk=130)
    problem = Problem(shape, torch.float32, torch.device("cpu"))
    rows = problem.rows(0.5)
    query = torch.arange(170, 300)[:, None]
    key = torch.arange(300)
    tile = torch.arange(130) // 48
    first = (170 + tile * 48) // 32
    local = (key >= first[:, None] * 32) & (key <= query)
    pairs = 0
    for h in range(2):
        kept = rows.keep[h, tile].repeat_interleave(32, -1)  # [queries, whole blocks' keys]
        seen = local.clone()
        seen[:, : kept.shape[1]] |= kept
        pairs += 3 * int(seen.sum())
    assert rows.kept_pairs == pairs
    assert shape.causal_pairs() == int((key <= query).sum())
    everything = problem.rows(1.0)
    assert everything.kept_pairs == 6 * shape.causal_pairs()


def test_of_peak() -> None:
    rows = [
        {"ours_tflops": 4.0, "flash_tflops": 8.0, "cudnn_tflops": None},
        {"ours_tflops": 3.0, "flash_tflops": 5.0, "cudnn_tflops": 10.0},
    ]
    add_peak(rows)
    assert [row["of_peak"] for row in rows] == [0.4, 0.3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_dry_run() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.attention", "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("correct: attention in 1 configurations")
    assert len(lines) == 1 + 2 + 4  # checked, measured twice, a table of two rows
    cells = [line.replace(" ", "").split("|")[1:4] for line in lines[-2:]]
    assert cells == [["192", "4/2", "1.000"], ["192", "4/2", "0.500"]]
