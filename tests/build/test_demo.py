"""The demo's parts say why they failed and leave nothing running."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools.demo import ROOT
from tools.service_process import ServiceProcess
from tools.vllm_alone import Question, answer


def test_service_that_does_not_start(tmp_path: Path) -> None:
    arguments = ["--model", str(tmp_path), "--ranks", "0", "--data-dir", str(tmp_path / "data")]
    with (
        ServiceProcess(arguments, tmp_path / "log") as service,
        pytest.raises(RuntimeError, match=r"exited with code 2: .*engine\.ranks = 0 .*1 to 64"),
    ):
        service.wait_ready(60, lambda elapsed: None)


def test_stop_kills_what_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the command: it and its child ignore SIGTERM."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    command = tmp_path / "prefill-service"
    command.write_text(
        f"#!{sys.executable}\n{stubborn}"
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn + 'time.sleep(60)'!r}],"
        " start_new_session=True)\n"
        "time.sleep(1)\n"
        "print('serving on 127.0.0.1:1', flush=True)\n"
        "time.sleep(60)\n"
    )
    command.chmod(0o755)
    monkeypatch.setattr("tools.service_process.STOP_SECONDS", 0.5)
    monkeypatch.setattr("tools.service_process.sys.executable", str(tmp_path / "python"))
    service = ServiceProcess([], tmp_path / "log")
    with service:
        service.wait_ready(30, lambda elapsed: None)
        assert service.address == "127.0.0.1:1"
        family = psutil.Process(service._process.pid).children()
        assert len(family) == 1
        assert len(service.stop()) == 2
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_reference_names_its_reason(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"exited with code 1: .*config\.json is missing"):
        answer(tmp_path, [Question(str(tmp_path / "video.mp4"), [("user", "why?")])])


def test_demo_fails_with_the_reason_last(tmp_path: Path) -> None:
    """A folder in the place of the checkpoint that the demo's tool has not made."""
    script = (
        "import sys, pathlib, tools.demo as demo\n"
        f"demo.ROOT = pathlib.Path({str(tmp_path)!r}); demo.FOLDER = demo.ROOT / 'demo'\n"
        "(demo.ROOT / 'build' / 'checkpoints' / demo.FAMILY).mkdir(parents=True)\n"
        "demo.main()\n"
    )
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    last = result.stdout.splitlines()[-1]
    assert last.startswith("DEMO FAILED: ")
    assert "is no checkpoint of this tool" in last
    assert time.monotonic() - start < 60
