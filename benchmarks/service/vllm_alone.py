"""vLLM's own OpenAI server: its own video loading, vision tower and chunked prefill."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from typing_extensions import override

from benchmarks.processes import cpu_seconds, tree
from benchmarks.service.cases import BATCH, QUESTIONS, Case
from benchmarks.service.systems import (
    KV_BYTES,
    MAX_TOKENS,
    PENALTY,
    START_S,
    Asked,
    Measured,
    Setup,
    System,
    third_of,
)

NAME = "model"
_ANSWER_S = 3600.0


class VllmServer(System):
    """A stock vLLM server that reads the video file in place.

    Args:
        setup: where to start it.
        extra: further arguments, which win over ours.
        environment: variables that win over ours.

    Raises:
        RuntimeError: (on entry) it ended or was not healthy in time; with the end of its log.
    """

    name = "vllm"
    ranks = 1
    modes: tuple[str, ...] = ("exact",)

    def __init__(
        self,
        setup: Setup,
        extra: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._log = setup.folder / "vllm.log"
        self.cold_start_s = 0.0
        self._port = _free_port()
        self.arguments = [
            "--model",
            str(setup.checkpoint),
            "--served-model-name",
            NAME,
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
            "--dtype",
            "float32",
            "--max-model-len",
            str(setup.longest),
            "--kv-cache-memory-bytes",
            str(KV_BYTES),
            "--enable-prefix-caching",
            "--allowed-local-media-path",
            "/",
            "--limit-mm-per-prompt",
            json.dumps({"video": 1, "image": 0}),
            "--enforce-eager",
            "--disable-uvicorn-access-log",
            *extra,
        ]
        # Both cores for the worker (vLLM's "auto" leaves it one of two), as for the ranks.
        self.environment = {
            "OMP_NUM_THREADS": str(setup.cores),
            "OMP_WAIT_POLICY": "passive",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environment or {}),
        }

    def __enter__(self) -> Self:
        start = time.perf_counter()
        with self._log.open("w") as log:
            # Our launcher is vLLM's server, ending with its parent.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefill_service.generation.vllm_server", *self.arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_healthy()
        except BaseException:
            self._stop()
            raise
        self.cold_start_s = time.perf_counter() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it serves."""
        return f"http://127.0.0.1:{self._port}"

    @override
    def measure(self, case: Case, mode: str) -> Measured:
        before = cpu_seconds(self.pid)
        first = self._ask(case.video, QUESTIONS[0])
        first.cpu_s = cpu_seconds(self.pid) - before
        second = self._ask(case.video, QUESTIONS[1])
        third = third_of(
            lambda question: self._ask(case.video, question).first_token_s, QUESTIONS[BATCH]
        )
        return Measured(first, second, third)

    def _ask(self, video: Path, question: str) -> Asked:
        start = time.perf_counter()
        first = None
        token_ids: list[int] = []
        prompt: list[int] | None = None
        for event in self._stream(video, question):
            prompt = event.get("prompt_token_ids") or prompt
            for choice in event.get("choices", ()):
                if new := choice.get("token_ids"):
                    first = first or time.perf_counter() - start
                    token_ids += new
        if first is None:
            raise RuntimeError(f"vLLM alone gave no token for {video}")
        return Asked(first, token_ids, prompt)

    def _stream(self, video: Path, question: str) -> Iterator[dict[str, Any]]:
        content = [
            {"type": "video_url", "video_url": {"url": video.absolute().as_uri()}},
            {"type": "text", "text": question},
        ]
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "repetition_penalty": PENALTY,
            "stream": True,
            "return_token_ids": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_S)
        try:
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            if response.status != 200:
                text = response.read(2000).decode(errors="replace")
                raise RuntimeError(f"vLLM alone answered {response.status}: {text}")
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    yield json.loads(data)
        finally:
            connection.close()

    def _wait_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise RuntimeError(f"vLLM alone exited with code {code}:\n{self._tail()}")
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
            with suppress(OSError):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            connection.close()
            time.sleep(0.5)
        raise RuntimeError(f"vLLM alone was not healthy in {START_S:g} s:\n{self._tail()}")

    def _stop(self) -> None:
        members = []
        for pid in tree(self._process.pid):
            with suppress(psutil.NoSuchProcess):
                members.append(psutil.Process(pid))
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        psutil.wait_procs(members, timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
