"""A service in a process of its own, for the demo and for whoever else needs a real one."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

STOP_S = 60.0
_SERVING = re.compile(r"serving on (\S+:\d+)")


class ServiceProcess:
    """``prefill-service serve`` as a context manager: ready on entry, gone on exit.

    Args:
        arguments: command-line arguments after ``serve``; the port is picked by the service.
        log: file that gets the service's log.
        launcher: what the command is preceded by, such as a program that enters a namespace.
        environment: variables of the service; this process's unless given.

    Attributes:
        address: ``host:port`` once it serves.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = arguments
        self._log = log
        self._launcher = launcher
        self._environment = environment
        self._serving = threading.Event()
        self._family: set[psutil.Process] = set()  # known even if the service dies first
        self.address = ""

    def __enter__(self) -> Self:
        command = [str(Path(sys.executable).with_name("prefill-service")), "serve", "--port", "0"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*self._launcher, *command, *self._arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=self._read_output, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float, tick: Callable[[float], None]) -> None:
        """Wait until it serves; ``tick`` is called every half second with the seconds so far.

        Raises:
            RuntimeError: it ended, or did not serve in time; carries the last line of its log.
        """
        start = time.monotonic()
        while not self._serving.wait(0.5):
            elapsed = time.monotonic() - start
            self.check()
            if elapsed > timeout_s:
                raise RuntimeError(
                    f"the service did not serve within {timeout_s:g} s: {self._last_words()}"
                )
            tick(elapsed)
        self._family = self._running()

    @property
    def pid(self) -> int:
        """Process id of the service, the root of all its processes."""
        return self._process.pid

    def wait(self) -> int:
        """Wait for the end of the service's first process; returns its exit code."""
        return self._process.wait()

    def check(self) -> None:
        """Raise RuntimeError if it has ended, with its exit code and the last line of its log."""
        code = self._process.poll()
        if code is not None:
            raise RuntimeError(f"the service exited with code {code}: {self._last_words()}")

    def stop(self) -> list[str]:
        """SIGTERM, and SIGKILL for whatever of it still runs a minute later.

        Returns:
            The command lines of processes that had to be killed.
        """
        family = self._running() | self._family
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            psutil.wait_procs(family, timeout=STOP_S)
        finally:  # on a second Ctrl-C too
            survivors = [process for process in family if process.is_running()]
            killed = [_describe(process) for process in survivors]
            for process in survivors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
        return killed

    def _running(self) -> set[psutil.Process]:
        """The service and every process it started, vLLM's included."""
        try:
            service = psutil.Process(self._process.pid)
            return {service, *service.children(recursive=True)}
        except psutil.NoSuchProcess:
            return set()

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := _SERVING.search(line):
                self.address = match[1]
                self._serving.set()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it logged nothing")


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:80]}"
    except psutil.Error:
        return str(process.pid)
