"""A decoder process: started before it is known for what, given one file, killed."""

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

_CHILD = "prefill_service.video.decoder.child"
_PIPE_BYTES = 1 << 20
_KEPT_ENVIRONMENT = ("PYTHONPATH", "LD_LIBRARY_PATH")


class DecoderProcess:
    """``decoder.child`` in a process of its own, waiting for a request.

    The thread that makes it must live as long as it: the process asks the kernel to be killed when
    that thread is gone.

    Attributes:
        stdout: its answers.
        stderr: what it has to say otherwise.
    """

    def __init__(self) -> None:
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the process
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-P", "-m", _CHILD, str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                bufsize=0,
                cwd="/",
                env=_environment(),
                start_new_session=True,
            )
        assert self._process.stdout is not None
        self.stdout = self._process.stdout
        with contextlib.suppress(OSError):  # above the system's limit for pipes
            fcntl.fcntl(self.stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def give(self, request: IO[bytes], video: int) -> None:
        """Hand over the one request, a file to read from where it stands, and the video's fd."""
        with contextlib.suppress(OSError):  # it has died: reading its answer will tell of what
            socket.send_fds(self._requests, [b"\0"], [request.fileno(), video])
        self._requests.close()

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it lives on.
        """
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once; harmless if it has ended."""
        self._process.kill()

    def close(self) -> None:
        """Kill it and wait for its end. Idempotent."""
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
