"""Decoder processes started ahead, so that no video waits for a Python to start.

A start takes a tenth of a second of a core, of a short video's answer a quarter. A process serves
one file and ends, as untrusted files demand, so another takes its place: a moment after all that
were taken are back, since those who have work need the core more; or, beside one that takes long,
for a short video that overtakes it.
"""

from __future__ import annotations

import logging
import math
import threading
import time

from prefill_service.video.decoder.process import DecoderProcess

log = logging.getLogger("prefill_service.video")


class DecoderPool:
    """Some decoder processes that wait for a file; for any thread.

    Args:
        count: how many wait; 0: each is started when it is needed.
        quiet_s, long_s: seconds until the next is started, after the last was given back, and
            beside one that is not.
    """

    def __init__(self, count: int, quiet_s: float = 0.5, long_s: float = 5.0) -> None:
        self._count, self._quiet_s, self._long_s = count, quiet_s, long_s
        self._changed = threading.Condition()
        self._waiting: list[DecoderProcess] = []
        self._taken = 0
        self._due = -math.inf  # when the next may be started
        self._closed = False
        self._thread = threading.Thread(target=self._keep, name="decoder-spares", daemon=True)
        if count:
            self._thread.start()

    def take(self) -> DecoderProcess:
        """One that waits, or a new one, made by this thread; ``give_back`` is due for either."""
        with self._changed:
            self._taken += 1
            self._due = time.monotonic() + self._long_s
            self._changed.notify()
            while self._waiting:
                process = self._waiting.pop()
                if process.alive:
                    return process
                process.close()
        try:
            return DecoderProcess()
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """One that was taken has been closed."""
        with self._changed:
            self._taken -= 1
            if not self._taken:
                self._due = time.monotonic() + self._quiet_s
            self._changed.notify()

    def close(self) -> None:
        """End those that wait, and those that were taken, too. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        while self._waiting:
            self._waiting.pop().close()

    def _keep(self) -> None:
        while self._wait_until_due():
            try:
                process = DecoderProcess()
            except OSError as error:
                log.warning("no decoder process can be started ahead: %s", error)
                process = None
            with self._changed:
                if process is None:
                    self._due = time.monotonic() + self._quiet_s
                else:
                    self._waiting.append(process)

    def _wait_until_due(self) -> bool:
        """Until one is to be started (``True``), or none any more."""
        with self._changed:
            while not self._closed:
                enough = len(self._waiting) >= self._count
                left = None if enough else self._due - time.monotonic()
                if left is not None and left <= 0:
                    return True
                self._changed.wait(left)
            return False
