"""Start-up and shutdown of the whole service, its own vLLM included."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from prefill_service.runtime_folder import PREFIX
from tests.scheduling.test_traces import check_format
from tests.support.leftovers import short_folder
from tests.support.service_process import service_environment, service_process
from tests.vllm_server import VllmServer


@pytest.fixture
def temporary() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


def test_embedded_vllm_is_restarted_when_it_dies_and_nothing_stays_behind(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    video = make_video(seconds=4, fps=5, width=160, height=120)
    with service_process(checkpoint("qwen3_vl"), tmp_path, "--ranks", "1") as service:
        with service.client() as client:
            before = client.ask(video, "What happens?", max_tokens=8).result()
            found = check_format(json.loads(client.trace_job(before.job_id)))
            assert set(found["rank 0"]) == {"decode", "vision", "prefill"}
            (answered,) = [e for e in found["service"]["questions"] if e["name"] == "answer"]
            assert answered["ts"] > found["rank 0"]["prefill"][-1]["ts"]
            assert answered["args"]["kv_bytes_moved"] > 0
            for process in service.children("vllm_server")[:1]:
                process.kill()
            after = client.ask(video, "What happens?", max_tokens=8, timeout=240).result()
        assert after.token_ids == before.token_ids
        vllm = [p.cmdline() for p in service.children("vllm_server")]
        assert any("--language-model-only" in line for line in vllm), "vLLM holds a vision tower"


def test_a_service_killed_outright_leaves_one_folder_which_the_next_start_removes(
    checkpoint: Callable[..., Path],
    vllm: Callable[[str], VllmServer],
    tmp_path: Path,
    temporary: Path,
) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "prefill_service.cli.main",
                "serve",
                "--ranks",
                "2",
                "--model",
                str(checkpoint("qwen3_vl")),
                "--port",
                "0",
                "--data-dir",
                str(tmp_path / "data"),
                *vllm("qwen3_vl").arguments,
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=service_environment(temporary),
        )
    deadline = time.monotonic() + 120
    while "serving on" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = psutil.Process(process.pid).children()
    (forks,) = [child for child in started if "prefill_service.engine.worker" in child.cmdline()]
    assert len(forks.children()) == 2
    below = psutil.Process(process.pid).children(recursive=True)  # decoders that wait, too
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(below, timeout=5)
    assert not alive
    (left,) = temporary.iterdir()
    assert left.name.startswith(PREFIX)
    # The next start is this one, up to where it finds that there is no checkpoint.
    next_start = serve("--model", str(tmp_path), environment=service_environment(temporary))
    assert next_start.returncode == 1
    assert "MODEL_INVALID" in next_start.stderr
    assert list(temporary.iterdir()) == []


def serve(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefill_service.cli.main", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_port_in_use_is_named(
    checkpoint: Callable[..., Path], vllm: Callable[[str], VllmServer], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve(
            *("--model", str(checkpoint("qwen3_vl")), "--port", str(port)),
            *("--data-dir", str(tmp_path), *vllm("qwen3_vl").arguments),
        )
    assert result.returncode == 1
    assert str(port) in result.stderr.splitlines()[-1]
    assert "PORT_IN_USE" in result.stderr.splitlines()[-1]


def test_a_model_folder_without_a_file_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))
    (model / "tokenizer.json").unlink()
    result = serve("--model", str(model), "--data-dir", str(tmp_path / "data"))
    assert result.returncode == 1
    assert "tokenizer.json" in result.stderr.splitlines()[-1]
