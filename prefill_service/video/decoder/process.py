"""A decoder process: started before its task is decided, assigned one file, killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

import prefill_service

_CHILD_MODULE = "prefill_service.video.decoder.child"
_PIPE_BYTES = 1 << 20
_KEPT_ENVIRONMENT = ("PYTHONPATH", "LD_LIBRARY_PATH")


class DecoderProcess:
    """``decoder.child`` in a process of its own, waiting for a request.

    Attributes:
        stdout: the pipe that its answers come through.
        stderr: the file that its other output goes to.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], requests: socket.socket, stderr: IO[bytes]
    ) -> None:
        assert process.stdout is not None
        self._process = process
        self._requests = requests
        self.stdout = process.stdout
        self.stderr = stderr

    @classmethod
    def start(cls) -> DecoderProcess:
        """Start a process; it is killed when the thread that calls this ends, by the kernel.

        Raises:
            OSError: the system has no room for another process.
        """
        with contextlib.ExitStack() as undo:
            stderr = undo.enter_context(tempfile.TemporaryFile())
            requests, its_requests = socket.socketpair()
            undo.enter_context(requests)
            with its_requests:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", _CHILD_MODULE, str(os.getpid())],
                    stdin=its_requests.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    bufsize=0,
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,
                )
            undo.pop_all()
        decoder = cls(process, requests, stderr)
        with contextlib.suppress(OSError):  # above the system's limit for pipes
            fcntl.fcntl(decoder.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        return decoder

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def assign(self, request: IO[bytes], video_fd: int) -> None:
        """Pass on the only request: a file, read from its position, and the video's descriptor."""
        with contextlib.suppress(OSError):  # it has died: reading its answer will say of what
            socket.send_fds(self._requests, [b"\0"], [request.fileno(), video_fd])
        self._requests.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the process to end; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended within ``timeout_s``.
        """
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End the process at once; does nothing if it has ended."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process, wait for its end and close its files. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self.stdout.close()
        self.stderr.close()


def _environment() -> dict[str, str]:
    """A cleared environment in which the process still finds this package."""
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    root = str(Path(prefill_service.__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    return {"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", **threads, **kept}
