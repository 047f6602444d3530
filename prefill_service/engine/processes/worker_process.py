"""The process of one worker, seen from the front end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Protocol

from prefill_service.engine import messages as msg
from prefill_service.engine.processes.fork_server import MODULE, ForkServer


class _Process(Protocol):
    """What ``subprocess.Popen`` and ``ForkedProcess`` have in common."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...

    def kill(self) -> None: ...


class WorkerProcess:
    """Spawns a worker and carries messages. Callbacks run on the event loop.

    A thread reads and a thread writes, both for as long as the process lives: a worker that hangs
    does not read, and a task of some thousand tokens is more than its socket takes.

    Args:
        spec: sent to the worker as its first message.
        fork_server: forks the process, unless it is to compute on a GPU.
        on_message: called with each message except heartbeats.
        on_exit: called once with (rank, how it ended) when the process is gone.
    """

    def __init__(
        self,
        spec: msg.WorkerSpec,
        fork_server: ForkServer,
        *,
        on_message: Callable[[object], None],
        on_exit: Callable[[int, str], None],
    ) -> None:
        self.rank = spec.rank
        self._spec = spec
        self._fork_server = fork_server
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._last_message_at = self._last_progress_at = time.monotonic()
        self._units_done = -1
        self._busy = False
        self._process: _Process | None = None
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Spawn the process and send it its spec.

        Raises:
            OSError: there are no processes, descriptors or memory left.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = self._process = self._spawn(theirs.fileno())
            pipe = Connection(ours.detach())
        writer = threading.Thread(
            target=self._write, args=(pipe,), name=f"rank{self.rank}-writer", daemon=True
        )
        writer.start()
        self.send(self._spec)
        threading.Thread(
            target=self._read,
            args=(process, pipe, writer),
            name=f"rank{self.rank}-reader",
            daemon=True,
        ).start()

    @property
    def pid(self) -> int:
        """The process's id; 0 before it is there, which may be later than ``start`` returns."""
        return self._process.pid if self._process else 0

    @property
    def silent_s(self) -> float:
        """Seconds since the last message, heartbeats included."""
        return time.monotonic() - self._last_message_at

    @property
    def stalled_s(self) -> float:
        """Seconds for which a busy worker has made no progress; 0 when it is idle."""
        return time.monotonic() - self._last_progress_at if self._busy else 0.0

    def send(self, message: object) -> None:
        """Queue a message, to be sent in the order of the calls; never blocks.

        What a worker does not live to read is lost; the reader thread reports its death.
        """
        self._outbox.put(pickle.dumps(message))

    def kill(self) -> None:
        """SIGKILL. The reader thread reaps it."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    async def wait(self, timeout_s: float) -> None:
        """Wait until the process is gone, at most ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._gone.wait()

    def _spawn(self, descriptor: int) -> _Process:
        environment = _environment(self._spec)
        if self._spec.device != "cuda":
            return self._fork_server.fork(descriptor, environment)
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(descriptor)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            env=environment,
        )

    def _write(self, pipe: Connection) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                pipe.send_bytes(message)

    def _read(self, process: _Process, pipe: Connection, writer: threading.Thread) -> None:
        try:
            while True:
                message = pipe.recv()
                self._call(self._deliver, message)
        except (EOFError, OSError):
            pass
        code = process.wait()
        self._outbox.put(None)
        writer.join()  # at once: nobody is left to read. The pipe must not be closed under it.
        pipe.close()
        self._call(self._gone.set)
        self._call(self._on_exit, self.rank, _how_it_ended(code))

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, message: object) -> None:
        self._last_message_at = time.monotonic()
        if not isinstance(message, msg.Heartbeat):
            self._on_message(message)
            return
        if message.units_done != self._units_done or not message.busy:
            self._last_progress_at = self._last_message_at
        self._units_done = message.units_done
        self._busy = message.busy


def _environment(spec: msg.WorkerSpec) -> dict[str, str]:
    return {
        # Matrix products are compiled for their shapes; torch and oneDNN each keep the last 1,024.
        # A long prompt has more shapes, and most do not come again. With these limits nothing
        # takes longer, and a worker is 80 to 130 MiB smaller.
        "LRU_CACHE_CAPACITY": "64",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        **os.environ,
        "OMP_NUM_THREADS": str(spec.threads),
        # Workers, video decoders and vLLM share the cores: a thread that spins while it waits
        # takes them away (measured up to tenfold slow-down on two cores).
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        # What a killed worker leaves behind is removed before its successor starts.
        "TMPDIR": spec.runtime_dir,
    }


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
