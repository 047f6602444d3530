"""The embedded vLLM: its command line, environment, process group and log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefill_service.compat import check_vllm, installed_vllm
from prefill_service.config import VllmConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.group_memory import (
    list_memory,
    remove_listed_memory,
    running_members,
)
from prefill_service.generation.load_format import DEQUANTIZE_ARGUMENTS

logger = logging.getLogger(__name__)

_TERM_S = 10.0
_TRACKER_S = 5.0
_GROUP_POLL_S = 0.05
_LOG_LINES = 15

_RESOURCE_TRACKER = b"multiprocessing.resource_tracker"

SCHEDULER = "prefill_service.kv.vllm_connector.fair_scheduler.make_scheduler"


def kv_transfer_config(config: VllmConfig) -> dict[str, Any]:
    """vLLM's ``--kv-transfer-config``: our connector, and what its scheduler is to keep to."""
    return {
        "kv_connector": "PrefillConnector",
        "kv_connector_module_path": "prefill_service.kv.vllm_connector.connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "prefill_step_s": config.prefill_step_s,
            "prefill_share": config.prefill_share,
            "allow_any_version": config.allow_any_version,
        },
    }


class VllmProcess:
    """One run of ``python -m prefill_service.generation.vllm_server``.

    Args:
        config: size and limits.
        model_path: folder or hub id of the checkpoint.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"cpu"`` or ``"cuda"``.
        log_path: where its output goes; appended.
        runtime_dir: where it gets a folder for temporary files, which is removed with it.
        fp8: whether the checkpoint's weights are FP8.
    """

    def __init__(
        self,
        config: VllmConfig,
        model_path: str,
        dtype: str,
        *,
        device: str,
        log_path: Path,
        runtime_dir: Path | None = None,
        fp8: bool = False,
    ) -> None:
        self._config = config
        self._model_path = model_path
        self._dtype = dtype
        self._device = device
        self._log_path = log_path
        self._runtime_dir = runtime_dir
        self._folder = ""
        # vLLM multiplies FP8 itself on GPUs only, and not with float32 activations.
        self._dequantize = fp8 and (device == "cpu" or dtype == "float32")
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.api_key = secrets.token_urlsafe(32)

    async def launch(self) -> None:
        """Start the process; it serves on ``url`` once it is healthy, in about a minute.

        Raises:
            ServiceError: DECODER_UNAVAILABLE if it cannot be started, or is not a supported
                release.
        """
        any_version = self._config.allow_any_version
        check_vllm(installed_vllm(), "this environment's", any_version=any_version)
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "prefill_service.generation.vllm_server"]
        try:
            self._folder = tempfile.mkdtemp(prefix="vllm-", dir=self._runtime_dir)
            with self._log_path.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    *self._arguments(port),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,
                )
        except OSError as error:
            self._remove_folder()
            raise ServiceError(Reason.DECODER_UNAVAILABLE, f"cannot start vLLM: {error}") from error
        logger.info("vLLM starts as process %d, log in %s", self._process.pid, self._log_path)

    @property
    def pid(self) -> int | None:
        """Process id of the API server, while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process is not None else None

    def exit_text(self) -> str:
        """How it ended and the last lines of its log, for error messages."""
        code = None if self._process is None else self._process.returncode
        state = "is running" if code is None else f"exited with code {code}"
        return f"vLLM {state}; end of {self._log_path}:\n{self._log_tail()}"

    async def wait(self) -> None:
        """Return when the process has ended."""
        if self._process is not None:
            await self._process.wait()

    async def kill(self, grace_s: float = _TERM_S) -> None:
        """SIGTERM, then after ``grace_s`` SIGKILL, to the whole process group.

        multiprocessing's resource tracker is killed last of all: it removes the shared memory of
        the others once they have ended.
        """
        process = self._process
        if process is None:
            return
        self.list_memory()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
        # EngineCore and workers are in its group and may outlive it.
        if not await _wait_group_ended(process.pid, grace_s):
            for pid, command in running_members(process.pid):
                if _RESOURCE_TRACKER not in command:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await _wait_group_ended(process.pid, _TRACKER_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        self._remove_folder()

    def list_memory(self) -> None:
        """Keep the names of its shared memory, for when all of it is killed at once."""
        if self._process is not None:
            list_memory(self._process.pid, Path(self._folder))

    def _remove_folder(self) -> None:
        if self._folder:
            remove_listed_memory(Path(self._folder))
            shutil.rmtree(self._folder, ignore_errors=True)

    def _arguments(self, port: int) -> list[str]:
        config = self._config
        arguments = [
            "--model", self._model_path,
            "--served-model-name", "prefill-service",
            "--host", "127.0.0.1",
            "--port", str(port),
            "--dtype", self._dtype,
            "--max-model-len", str(config.max_model_len or "auto"),
            "--enable-scale-out",
            "--enable-prompt-tokens-details",
            "--enable-prefix-caching",
            "--language-model-only",
            "--enable-mm-embeds",  # from 0.33 on a text-only vLLM takes no grid item without it
            "--disable-uvicorn-access-log",
            "--kv-transfer-config", json.dumps(kv_transfer_config(config)),
        ]  # fmt: skip
        if config.prefill_share:
            arguments += ["--scheduler-cls", SCHEDULER]
        if self._dequantize:
            arguments += DEQUANTIZE_ARGUMENTS
        if config.block_size:
            arguments += ["--block-size", str(config.block_size)]
        if self._device == "cpu":
            arguments += ["--enforce-eager"]
            arguments += ["--kv-cache-memory-bytes", str(int(config.kv_cache_gib * (1 << 30)))]
        else:
            arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
        return arguments + config.extra_args

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment["PREFILL_SERVICE_PARENT_PID"] = str(os.getpid())
        environment["VLLM_NO_USAGE_STATS"] = "1"
        environment["VLLM_API_KEY"] = self.api_key  # not an argument: those anybody can list
        # What it makes in the temporary folder outlives a kill. Its compiler's cache is to.
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_compiler_cache()))
        environment["TMPDIR"] = environment["VLLM_RPC_BASE_PATH"] = self._folder
        environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override our configuration
        environment["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # vllm_server's top level
        if Path(self._model_path).is_dir():
            environment["HF_HUB_OFFLINE"] = "1"
        if self._device == "cpu":
            # The workers use the same cores: half the threads, none pinned, none spinning.
            threads = max(1, len(os.sched_getaffinity(0)) // 2)
            environment.setdefault("OMP_NUM_THREADS", str(threads))
            environment.setdefault("OMP_WAIT_POLICY", "passive")
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        return environment

    def _log_tail(self) -> str:
        try:
            with self._log_path.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - (1 << 14)))
                text = log.read().decode(errors="replace")
        except OSError as error:
            return f"(cannot be read: {error})"
        return "\n".join(text.splitlines()[-_LOG_LINES:])


async def _wait_group_ended(group: int, timeout_s: float) -> bool:
    """Whether the last process of the group has ended within ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while running_members(group):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_GROUP_POLL_S)
    return True


def _compiler_cache() -> Path:
    """Where torch's compiler keeps what it has compiled for vLLM."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache / "prefill-service" / "torchinductor"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a user without a folder
        return Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}"
    return cache


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
