"""``doctor``: a finding for each thing that the service needs, a remedy for each that it lacks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from prefill_service.cli.config_loading import resolve_config
from prefill_service.cli.machine_checks import (
    Finding,
    Level,
    check_machine,
    check_packages,
    check_vllm,
)
from prefill_service.cli.main import main
from prefill_service.config import ServiceConfig
from prefill_service.video.decoder.sandbox.landlock import landlock_abi
from prefill_service.video.decoder.sandbox.seccomp import seccomp_available
from tools.make_fp8_checkpoint import quantize

HERE = {"server": {"port": 0}, "engine": {"device": "cpu"}}


def config_of(folder: Path, **sections: dict[str, Any]) -> ServiceConfig:
    given = {**HERE, "storage": {"data_dir": str(folder / "data")}}
    for section, values in sections.items():
        given[section] = {**given.get(section, {}), **values}
    return resolve_config(None, given).config


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def findings(folder: Path, **sections: dict[str, Any]) -> dict[str, Finding]:
    return by_subject(check_machine(config_of(folder, **sections)))


def test_this_machine_can_run_the_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--port", "0", "--device", "cpu", "--data-dir", str(tmp_path)]
    assert main(["doctor", *options]) == 0
    text = capsys.readouterr().out
    assert text.endswith("\nnothing required is missing\n")
    for subject in ("packages", "GPUs", "vLLM", "video", "memory", "data folder", "port"):
        assert f" {subject} " in text
    assert "torch 2.13.0" in text
    assert not (tmp_path / "data").exists()


def test_missing_things_are_named_with_a_remedy_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["doctor", "--json", "--device", "cpu", "--port", port]
        assert main([*arguments, "--data-dir", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    [missing] = [one for one in found if one["level"] == "missing"]
    assert missing["subject"] == "port"
    assert missing["text"].startswith(f"127.0.0.1:{port} cannot be used: Address already in use")
    assert "another --port" in missing["remedy"]


def test_packages_are_compared_with_what_is_asked_for() -> None:
    wanted = ["numpy>=99", "no-such-package", "torch", 'pywin32; sys_platform == "win32"']
    [packages] = check_packages(wanted)
    assert packages.level is Level.MISSING
    version = importlib.metadata.version("numpy")
    assert packages.text.endswith(f"unmet: numpy>=99 ({version}), no-such-package (not there)")
    assert "pip install" in packages.remedy


def test_vllm_is_needed_unless_one_runs_elsewhere(tmp_path: Path) -> None:
    embedded = by_subject(check_vllm(config_of(tmp_path), ""))
    assert embedded["vLLM"].level is Level.MISSING
    remote = config_of(tmp_path, vllm={"url": "http://127.0.0.1:8000"})
    elsewhere = by_subject(check_vllm(remote, ""))
    assert elsewhere["vLLM"].level is Level.OK
    assert "libnuma" not in elsewhere


def test_cuda_that_is_asked_for_and_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert findings(tmp_path, engine={"device": "auto"})["GPUs"].level is Level.OK
    missing = findings(tmp_path, engine={"device": "cuda"})["GPUs"]
    assert missing.level is Level.MISSING
    assert "--device cpu" in missing.remedy


def test_data_folder(tmp_path: Path) -> None:
    roomy = findings(tmp_path, storage={"max_upload_bytes": 1, "min_free_bytes": 0})
    assert roomy["data folder"].level is Level.OK
    tight = findings(tmp_path, storage={"max_upload_bytes": 1 << 60})
    assert tight["data folder"].level is Level.NOTE
    full = findings(tmp_path, storage={"min_free_bytes": 1 << 60})
    assert full["data folder"].level is Level.MISSING
    (tmp_path / "file").touch()
    blocked = findings(tmp_path, storage={"data_dir": str(tmp_path / "file" / "data")})
    assert blocked["data folder"].level is Level.MISSING


def test_memory_processors_and_ports(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    found = findings(
        tmp_path,
        engine={"ranks": 64, "threads_per_rank": cores, "kv_pool_bytes": 1 << 60},
        server={"metrics_address": "192.0.2.1:9464"},
    )
    assert found["processors"].level is Level.NOTE
    assert found["memory"].level is Level.MISSING
    assert found["metrics port"].level is Level.MISSING
    assert all(found[one].remedy for one in ("processors", "memory", "metrics port"))


def test_sandbox(tmp_path: Path) -> None:
    found = findings(tmp_path)
    whole = bool(landlock_abi()) and seccomp_available()
    assert ("decoder sandbox" in found) == whole
    assert ("decoder files" in found) == (not landlock_abi())
    assert ("decoder system calls" in found) == (not seccomp_available())
    code = (
        "from prefill_service.config import ServiceConfig\n"
        "from prefill_service.cli.machine_checks import _check_sandbox\n"
        "print(next(_check_sandbox(ServiceConfig())))"
    )
    limited = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2.0 GiB (ulimit -v)" in limited.stdout


@pytest.mark.parametrize("method", ["", "fp8", "awq"])
def test_the_checkpoint_is_judged(
    checkpoint: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    folder = checkpoint("qwen3_vl")
    if method == "fp8":
        folder = quantize(folder, tmp_path / "fp8")
    elif method:
        folder = Path(shutil.copytree(folder, tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (folder / "config.json").write_text(json.dumps(config))
    model = findings(tmp_path, engine={"model": str(folder)})["model"]
    assert model.level is (Level.MISSING if method == "awq" else Level.OK)
    assert ("quant_method = 'awq' cannot be served; supported are" in model.text) is (
        method == "awq"
    )
    assert ("FP8 with a scale for each 128 x 128 block" in model.text) is (method == "fp8")


def test_a_hub_id_is_not_downloaded(tmp_path: Path) -> None:
    model = findings(tmp_path, engine={"model": "nobody/no-such-model"})["model"]
    assert model.level is Level.NOTE
    assert "the service would download it" in model.text
    assert "model" not in findings(tmp_path)
    gone = findings(tmp_path, engine={"model": str(tmp_path / "gone")})["model"]
    assert gone.level is Level.MISSING
