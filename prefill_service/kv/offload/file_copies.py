"""The copy engine of CPU ranks: a thread and a file."""

from __future__ import annotations

import errno
import os
import queue
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.attention_shape import PromptShape
from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.offload.copy_engine import Copy, CopyEngine, HostRows, Mark, Ticket, probe


@dataclass(eq=False, slots=True)
class _Work(Ticket):
    copies: Sequence[Copy]
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Instant(Mark):
    at: float


class FileCopyEngine(CopyEngine):
    """Rows in an unlinked file, copied by a thread: bounds a CPU rank's own memory.

    What was written stays in the page cache as long as the system has room for it, so that a
    file on a disk costs little until memory is short. In a folder on tmpfs it is memory.

    Args:
        shape: of the working set; ``start`` reserves the whole of it.
        folder: for the file.
    """

    def __init__(self, shape: PromptShape, folder: Path) -> None:
        super().__init__()
        self._shape = shape
        self._folder = folder
        self._stalled_s = 0.0
        self._file: IO[bytes]
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)

    @override
    def start(self) -> Self:
        """Make the file and begin.

        Raises:
            ServiceError: KV_POOL_FULL if there is no space; PREFILL_FAILED if nothing can be moved.
        """
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="offload-")  # noqa: SIM115
        except OSError as error:
            raise ServiceError(
                Reason.KV_POOL_FULL,
                f"no file for offloaded KV can be made in {self._folder}: {error.strerror}",
                folder=self._folder,
            ) from error
        try:
            self._reserve(self._shape.attending_layers * self._shape.layer_bytes)
        except ServiceError:
            self._file.close()
            raise
        self._thread.start()
        probe(self, self._shape)
        if self.failure is not None:
            self.close()
            raise self.failure
        self._stalled_s = 0.0
        return self

    @override
    def submit(self, copies: Sequence[Copy]) -> Ticket:
        work = _Work(copies)
        self._queue.put(work)
        return work

    @override
    def wait(self, ticket: Ticket) -> None:
        assert isinstance(ticket, _Work)
        if not ticket.done.is_set():
            start = time.perf_counter()
            ticket.done.wait()
            self._stalled_s += time.perf_counter() - start

    @override
    def mark(self) -> Mark:
        return _Instant(time.perf_counter())

    @override
    def seconds(self, start: Mark, end: Mark) -> float:
        assert isinstance(start, _Instant)
        assert isinstance(end, _Instant)
        return end.at - start.at

    @property
    @override
    def stalled_s(self) -> float:
        return self._stalled_s

    @override
    def close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._file.close()

    # ---- the thread ------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                if self.failure is None:
                    for copy in work.copies:
                        self._copy(copy)
            except OSError as error:
                self.failure = ServiceError(
                    Reason.PREFILL_FAILED,
                    f"offloaded KV in {self._folder} cannot be moved: {error.strerror}",
                    folder=self._folder,
                )
            except Exception as error:  # whoever waits must be told, whatever it is
                self.failure = ServiceError(
                    Reason.PREFILL_FAILED, f"offloaded KV cannot be moved: {error!r}"
                )
            finally:
                work.done.set()

    def _copy(self, copy: Copy) -> None:
        start = time.perf_counter()
        if isinstance(copy.backing, Tensor):
            backing = copy.backing
            target, source = (copy.rows, backing) if copy.to_device else (backing, copy.rows)
            target.copy_(source)
            self.device_rate.add(copy.num_bytes, time.perf_counter() - start)
            return
        self._move(copy.rows, copy.backing, copy.to_device)
        self.moved_bytes += copy.num_bytes
        self.host_rate.add(copy.num_bytes, time.perf_counter() - start)

    def _move(self, rows: Tensor, backing: HostRows, to_device: bool) -> None:
        """Between contiguous rows and the file; both calls let other threads run."""
        raw = memoryview(rows.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        offset = backing.layer * self._shape.layer_bytes + backing.start * self._shape.row_bytes
        while raw:
            fd = self._file.fileno()
            done = os.preadv(fd, [raw], offset) if to_device else os.pwrite(fd, raw, offset)
            if not done:
                raise OSError(errno.EIO, f"the file ends at byte {offset}")
            raw, offset = raw[done:], offset + done

    def _reserve(self, num_bytes: int) -> None:
        try:
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError as error:
            free = os.statvfs(self._file.fileno())
            raise ServiceError(
                Reason.KV_POOL_FULL,
                f"no space for {num_bytes} bytes of offloaded KV in {self._folder}, where "
                f"{free.f_bavail * free.f_frsize} are free: {error.strerror}",
                needed_bytes=num_bytes,
                folder=self._folder,
            ) from error
