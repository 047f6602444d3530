"""One rank process, seen from the front end."""

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

from prefill_service.engine import messages as msg
from prefill_service.engine.resolve import WorkerSpec


class WorkerProcess:
    """Spawns a rank and carries messages. Callbacks run on the event loop.

    A thread reads and a thread writes, both for as long as the process lives: a rank that hangs
    does not read, and a task of some thousand tokens is more than its socket takes.

    Args:
        spec: sent to the rank as its first message.
        on_message: called with each message but heartbeats.
        on_exit: called once with (rank, how it ended) when the process is gone.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        on_message: Callable[[object], None],
        on_exit: Callable[[int, str], None],
    ) -> None:
        self.rank = spec.rank
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._heard = self._advanced = time.monotonic()
        self._ticks, self._busy = -1, False

        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefill_service.engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(spec),
            )
        self.pid = self._process.pid
        self._pipe = Connection(ours.detach())
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(
            target=self._write, name=f"rank{self.rank}-writer", daemon=True
        )
        self._writer.start()
        self.send(spec)
        threading.Thread(target=self._read, name=f"rank{self.rank}-reader", daemon=True).start()

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard

    @property
    def stalled_s(self) -> float:
        """Seconds a busy rank has gone without progress; 0 when idle."""
        return time.monotonic() - self._advanced if self._busy else 0.0

    def send(self, message: object) -> None:
        """Send in the order of the calls; waits for nobody.

        What a rank does not live to read is lost; its death is its reader's business.
        """
        self._outbox.put(pickle.dumps(message))

    def kill(self) -> None:
        """SIGKILL. The reader thread reaps it."""
        if self._process.poll() is None:
            self._process.kill()

    async def wait(self, timeout_s: float) -> None:
        """Wait until the process is gone, at most ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._gone.wait()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._pipe.send_bytes(message)

    def _read(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                self._call(self._deliver, message)
        except (EOFError, OSError):
            pass
        code = self._process.wait()
        self._outbox.put(None)
        self._writer.join()  # at once: nobody is left to read. Its pipe is not closed under it
        self._pipe.close()
        self._call(self._gone.set)
        self._call(self._on_exit, self.rank, _how_it_ended(code))

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, message: object) -> None:
        self._heard = time.monotonic()
        if not isinstance(message, msg.Heartbeat):
            self._on_message(message)
            return
        if message.ticks != self._ticks or not message.busy:
            self._advanced = self._heard
        self._ticks, self._busy = message.ticks, message.busy


def _environment(spec: WorkerSpec) -> dict[str, str]:
    return {
        # Products are compiled for their shapes, and torch and oneDNN each keep the last 1,024. A
        # long prompt has more of them, and most do not come again: with these nothing takes longer,
        # and a rank is 80 to 130 MiB smaller.
        "LRU_CACHE_CAPACITY": "64",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
        **os.environ,
        "OMP_NUM_THREADS": str(spec.threads),
        # Ranks, decoders and vLLM share the cores: a thread that spins while it waits steals
        # them (measured up to tenfold slow-down on two cores).
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        # What a killed rank leaves behind is removed with the service's runtime directory.
        "TMPDIR": spec.runtime_dir,
    }


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
