"""Decoder processes started ahead, so that no video waits for a Python to start.

A start takes a tenth of a second of a core, of a short video's answer a quarter. A process serves
one file and ends, as untrusted files demand, so another takes its place: a moment after all that
were acquired are released, since those at work need the core more; or, beside one that takes long,
for a short video that preempts it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

from prefill_service.video.decoder.process import DecoderProcess

logger = logging.getLogger(__name__)


class DecoderPool:
    """Some decoder processes that wait for a file; for any thread.

    Args:
        count: how many wait; 0: each is started when it is acquired.
        quiet_s: seconds between the last release and the start of the next process.
        long_s: seconds until the next is started beside one that is not released.
        folder: where each process gets a folder of its own; by default the system's.

    Attributes:
        folder: as given.
    """

    def __init__(
        self,
        count: int,
        quiet_s: float = 0.5,
        long_s: float = 5.0,
        *,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self._count = count
        self._quiet_s = quiet_s
        self._long_s = long_s
        self._changed = threading.Condition()
        self._waiting: list[DecoderProcess] = []
        self._acquired = 0
        self._due = -math.inf  # when the next may be started
        self._closed = False
        self._thread = threading.Thread(target=self._keep_full, name="decoder-pool", daemon=True)

    def start(self) -> None:
        """Begin to start processes ahead."""
        if self._count:
            self._thread.start()

    def acquire(self) -> DecoderProcess:
        """A process that waits, or a new one, started by this thread.

        Close it and then call ``release``, whichever it is.

        Raises:
            OSError: none waits and the system has no room for another process.
        """
        with self._changed:
            self._acquired += 1
            self._due = time.monotonic() + self._long_s
            self._changed.notify()
            while self._waiting:
                process = self._waiting.pop()
                if process.alive:
                    return process
                process.close()
        try:
            return DecoderProcess.start()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Note that an acquired process has been closed."""
        with self._changed:
            self._acquired -= 1
            if not self._acquired:
                self._due = time.monotonic() + self._quiet_s
            self._changed.notify()

    def close(self) -> None:
        """End all processes that wait, and those acquired from among them. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        while self._waiting:
            self._waiting.pop().close()

    def _keep_full(self) -> None:
        while self._wait_until_due():
            try:
                process = DecoderProcess.start()
            except OSError as error:
                logger.warning("no decoder process can be started ahead: %s", error)
                process = None
            with self._changed:
                if process is None:
                    self._due = time.monotonic() + self._quiet_s
                else:
                    self._waiting.append(process)

    def _wait_until_due(self) -> bool:
        """Wait until a process is to be started (``True``) or the pool is closed (``False``)."""
        with self._changed:
            while not self._closed:
                enough = len(self._waiting) >= self._count
                left = None if enough else self._due - time.monotonic()
                if left is not None and left <= 0:
                    return True
                self._changed.wait(left)
            return False
