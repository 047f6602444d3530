"""``prefill-service serve`` as a user runs it: a process, a port, a data directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from prefill_client import Client

from tests.support.leftovers import shared_memory_of, short_folder, still_there

# Nothing listens there: a service that asked a proxy for its vLLM, or for anything else of this
# machine, would not come up.
DEAD_PROXIES = {
    name: "http://127.0.0.1:9"
    for lower in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
    for name in (lower, lower.upper())
}
READY = re.compile(r"serving on (\S+:\d+)")


def service_environment(temporary: Path) -> dict[str, str]:
    """An environment with a temporary folder of its own."""
    return {**os.environ, **DEAD_PROXIES, "TMPDIR": str(temporary)}


@dataclass
class ServiceProcess:
    """A service process, where it listens, and its temporary folder."""

    process: subprocess.Popen[str]
    address: str
    log: Path
    temporary: Path

    def client(self) -> Client:
        return Client(self.address, timeout=30)

    def children(self, word: str) -> list[psutil.Process]:
        """Processes that the service started whose command line contains ``word``.

        Not those that these start: until it runs a program of its own, a rank's has the rank's.
        """
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if any(word in part for part in child.cmdline()):
                    found.append(child)
        return found

    def workers(self) -> list[psutil.Process]:
        """The ranks: what the fork server has forked."""
        (fork_server,) = self.children("prefill_service.engine.worker")
        return fork_server.children()


@contextmanager
def service_process(
    model: Path, folder: Path, *arguments: str, start_s: float = 240.0
) -> Iterator[ServiceProcess]:
    """Start, wait until it serves, stop by SIGTERM; nothing may be left of it.

    However its ranks, its vLLM or its decoders ended meanwhile: no process, no shared memory, and
    nothing in the temporary folder, which is its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with short_folder() as temporary:
        with _run(model, folder, temporary, *arguments, start_s=start_s) as service:
            yield service
        left = sorted(temporary.rglob("*"))
        assert not left, f"left in the temporary folder: {left}"


@contextmanager
def _run(
    model: Path, folder: Path, temporary: Path, *arguments: str, start_s: float
) -> Iterator[ServiceProcess]:
    log = folder / "service.log"
    command = [sys.executable, "-m", "prefill_service.cli.main", "serve"]
    command += ["--model", str(model), "--port", "0", "--data-dir", str(folder / "data")]
    command += arguments
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=service_environment(temporary),
        )
    try:
        service = ServiceProcess(process, _wait_ready(process, log, start_s), log, temporary)
        family = psutil.Process(process.pid).children(recursive=True)
        memory = shared_memory_of(family)
        yield service
        family += psutil.Process(process.pid).children(recursive=True)
        memory |= shared_memory_of(family)
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-2000:]
        _, alive = psutil.wait_procs(set(family), timeout=5)
        assert not alive, f"left running: {alive}"
        left = still_there(memory, timeout_s=0)
        assert not left, f"left in shared memory: {left}"
    except BaseException:
        print(log.read_text()[-8000:])
        raise
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()


def _wait_ready(process: subprocess.Popen[str], log: Path, start_s: float) -> str:
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        if found := READY.search(log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise AssertionError(f"the service did not start:\n{log.read_text()[-4000:]}")
