"""The ``prefill-service`` command as a process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefill_service import __version__
from prefill_service.cli.main import main
from tests.support.service_process import DEAD_PROXIES
from tests.support.simulated_backends import SimulatedExecutor, SimulatedGenerationServer

Serve = Callable[..., Any]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefill_service.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["version"], ["serve", "--help"], ["config", "show"]])
def test_help_and_configuration_need_no_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'transformers', 'grpc', 'numpy', 'shtab')\n"
        "atexit.register(lambda: print('loaded:', [one for one in heavy if one in sys.modules]))\n"
        "from prefill_service.cli.main import main\n"
        "main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("loaded: []\n")
    if arguments == ["version"]:
        assert done.stdout.startswith(f"prefill-service {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serve"], "no model given"),
        (["serve", "--model", "m", "--ranks", "two"], "invalid int value: 'two'"),
        (["serve", "--model", "m", "--ranks", "0"], "engine.ranks = 0 is not accepted"),
        (["serve", "--model", "m", "--port", "70000"], "server.port = 70000"),
        (["serve", "--model", "m", "--engine-lease-ttl-s", "nan"], "lease_ttl_s = nan is not acc"),
        (["serve", "--model", "m", "--engine-heartbeat-timeout-s", "1"], "more than 1, the heartb"),
        (["serve", "--model", "m", "--engine-max-queued-jobs", "0"], "max_queued_jobs = 0"),
        (["serve", "--model", "m", "--engine-threads-per-rank", "-1"], "expected 0 or more"),
        (["serve", "--model", "m", "--server-max-concurrent-calls", "0"], "expected more than 0"),
        (["serve", "--model", "m", "--server-drain-seconds", "inf"], "drain_seconds = inf"),
        (["serve", "--model", "m", "--storage-expire-hours", "0"], "storage.expire_hours = 0.0"),
        (["serve", "--model", "m", "--storage-min-free-bytes", "-1"], "min_free_bytes = -1"),
        (["serve", "--model", "m", "--storage-import-roots", "videos"], "expected absolute paths"),
        (["serve", "--model", "m", "--storage-data-dir", ""], "storage.data_dir = ''"),
        (["serve", "--model", "m", "--video-max-frames", "-5"], "video.max_frames = -5"),
        (["serve", "--model", "m", "--video-stall-timeout-s", "0"], "video.stall_timeout_s = 0.0"),
        (["serve", "--model", "m", "--video-max-memory-bytes", "4096"], "536870912 or more"),
        (["serve", "--model", "m", "--vllm-kv-cache-gib", "0"], "vllm.kv_cache_gib = 0.0"),
        (["serve", "--model", "m", "--decoder-kv-cache-gib", "0"], "vllm.kv_cache_gib = 0.0"),
        (["serve", "--model", "m", "--vllm-gpu-memory-utilization", "45"], "at most 1"),
        (
            ["serve", "--model", "m", "--engine-sparse-block-tokens", "32"],
            "--engine-sparse-block-tokens: invalid choice: 32 (choose from 64, 128)",
        ),
        (["serve", "--model", "m", "--engine-sparse-from-tokens", "-1"], "expected 0 or more"),
        (["serve", "--model", "m", "--server-metrics-address", "9464"], "expected HOST:PORT"),
        (["serve", "--model", "m", "--server-metrics-address", "::1:80"], "expected HOST:PORT"),
        (["serve", "--model", "m", "--server-metrics-address", "a:70000"], "port 0 to 65535"),
        (["serve", "--config", "/nowhere.toml"], "cannot read /nowhere.toml"),
        (["serve", "--rank", "2"], "unrecognized arguments: --rank 2; did you mean --ranks?"),
        (["serve", "--model", "m", "--vllm-ulr=x"], "did you mean --vllm-url?"),
        (["config", "show", "--rank", "2"], "prefill-service config show: unrecognized arguments"),
        (["serve", "--model", "m", "--device", "tpu"], "choose from 'auto', 'cpu', 'cuda'"),
        (["healthcheck", "--tls-ca", "/nowhere.pem"], "cannot read /nowhere.pem"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_configuration_errors_are_one_line_and_code_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert text in error
    assert error.count("\n") == 1


def test_command_line_beats_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[engine]\nmodel = 'm'\nranks = 99\n[server]\nport = -1\n")
    assert main(["serve", "--config", str(config), "--ranks", "3"]) == 2
    assert "server.port = -1" in capsys.readouterr().err


def test_missing_model_is_a_failure_in_one_line(tmp_path: Path) -> None:
    done = run("serve", "--model", str(tmp_path / "none"), "--data-dir", str(tmp_path / "data"))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("prefill-service: ")
    assert "[MODEL_INVALID]" in done.stderr
    assert not (tmp_path / "data").exists()  # nor was anything started that writes there
    assert "Traceback" not in done.stderr


async def test_healthcheck(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in DEAD_PROXIES.items():
        monkeypatch.setenv(name, url)

    async def check(*arguments: str) -> tuple[int, str]:
        done = await asyncio.to_thread(run, "healthcheck", *arguments)
        return done.returncode, done.stdout + done.stderr

    group = SimulatedExecutor()
    async with serve(executor=group, generation=SimulatedGenerationServer(group)) as s:
        assert await check("--address", s.address) == (0, "SERVING\n")
        port = s.address.rpartition(":")[2]
        assert await check("--address", f"localhost:{port}") == (0, "SERVING\n")
        s.generation.die()
        await asyncio.sleep(0.5)
        assert await check("--address", s.address) == (1, "NOT_SERVING\n")
        assert (await check("--address", s.address, "--service", "liveness"))[0] == 0
        code, text = await check("--address", s.address, "--service", "nothing")
        assert (code, "NOT_FOUND" in text) == (1, True)
    code, text = await check("--address", s.address, "--timeout", "1")
    assert (code, "UNAVAILABLE" in text) == (1, True)
