"""The one command for GPUs: stages run in order, and none stops the next."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.gpu_check import STAGES, Stage, main, run_stages


def stage(name: str, *arguments: str, limit_s: float = 60) -> Stage:
    """``timeit`` runs one statement."""
    on_cpu = ("-n", "1", "-r", "1", *arguments)
    return Stage(name=name, module="timeit", on_gpu=(), on_cpu=on_cpu, limit_s=limit_s)


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [
        stage("breaks", "raise ValueError('this one')"),
        stage("hangs", "import time; time.sleep(60)", limit_s=2),
        stage("works", "open(r'{out}/found', 'w').write('yes')"),
    ]
    assert run_stages(stages, "cpu", tmp_path) == 1
    assert (tmp_path / "found").read_text() == "yes"
    assert "this one" in (tmp_path / "breaks.log").read_text()
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith("breaks: exit status 1")
    assert last[1].startswith("hangs: not done after 2 s")
    assert last[2].startswith("works: ok")
    assert (tmp_path / "summary.txt").read_text().splitlines() == last


def test_its_stages_exist_and_fit_ten_minutes() -> None:
    for one in STAGES:
        assert importlib.util.find_spec(one.module) is not None
    assert sum(one.limit_s for one in STAGES) < 600


def test_attention_is_rehearsed(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--out", str(tmp_path), "--stages", "attention"]) == 0
    assert "correct: attention" in (tmp_path / "attention.log").read_text()
