"""The parent's end of a decoder process: assign, read, time out, kill, explain a death."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.storage.disk_space import is_full
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.process import DecoderProcess
from prefill_service.video.decoder.protocol import MAX_HEADER_BYTES, PREFIX, Header, pack
from prefill_service.video.decoder.sandbox.resource_limits import ResourceLimits

logger = logging.getLogger(__name__)

_EXIT_S = 5.0
_CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGSYS}
)
"""Signals that a process brings on itself."""


def open_video(path: Path) -> int:
    """Open a regular, non-empty file for reading.

    Raises:
        ServiceError: NOT_A_VIDEO.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ServiceError(
            Reason.NOT_A_VIDEO, f"{path} cannot be opened: {error.strerror}", path=path
        ) from error
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return fd
    os.close(fd)
    what = "is empty" if stat.S_ISREG(status.st_mode) else "is not a regular file"
    raise ServiceError(Reason.NOT_A_VIDEO, f"{path} {what}", path=path)


@dataclass(frozen=True, slots=True)
class DecoderRequest:
    """What a decoder process is to do with a video.

    Attributes:
        header: JSON values; ``decoder.child`` says which.
        payload: raw bytes that belong to the header.
        cpu_s: CPU seconds that the process may use.
        max_answer_bytes: largest payload of a message accepted from the process.
    """

    header: Header
    payload: bytes
    cpu_s: float
    max_answer_bytes: int


class DecoderSession:
    """One sandboxed decoder process at work on one file.

    Reading is for one thread at a time; ``kill`` may come from any.
    """

    def __init__(
        self,
        process: DecoderProcess,
        folder: tempfile.TemporaryDirectory[str],
        limits: VideoConfig,
        *,
        max_answer_bytes: int,
        pool: DecoderPool | None,
    ) -> None:
        self._process = process
        self._folder = folder
        self._limits = limits
        self._max_answer_bytes = max_answer_bytes
        self._pool = pool
        self._head = bytearray()
        self._header: Header | None = None
        self._body = bytearray()
        self._filled = 0
        self._readable = select.poll()  # not select(): a server has descriptors above 1024
        self._readable.register(process.stdout, select.POLLIN)
        self._last_read = time.monotonic()
        self._ended_by_us = False

    @classmethod
    def open(
        cls,
        path: Path,
        request: DecoderRequest,
        limits: VideoConfig,
        pool: DecoderPool | None = None,
    ) -> DecoderSession:
        """Open the video and assign it to a process of the pool, or to a new one without a pool.

        The calling thread must live as long as the session: a process that it started dies with it.

        Args:
            path: the video; the process gets a descriptor, never the path.
            request: what the process is to do.
            limits: limits that it works under.
            pool: where to acquire the process.

        Raises:
            ServiceError: NOT_A_VIDEO; STORAGE_FULL if the disk of the temporary folder is full.
            OSError: the system has no room for another process.
        """
        try:
            return cls._assign(path, request, limits, pool)
        except OSError as error:
            if not is_full(error):
                raise
            raise ServiceError(
                Reason.STORAGE_FULL,
                f"the disk of the temporary folder is full: {error.strerror}",
            ) from error

    @classmethod
    def _assign(
        cls,
        path: Path,
        request: DecoderRequest,
        limits: VideoConfig,
        pool: DecoderPool | None,
    ) -> DecoderSession:
        with contextlib.ExitStack() as stack:
            fd = open_video(path)
            stack.callback(os.close, fd)
            folder = tempfile.TemporaryDirectory(
                prefix="prefill-decoder-", dir=pool.folder if pool else None
            )
            resources = ResourceLimits(limits.max_memory_bytes, max(1, int(request.cpu_s)))
            header = {
                **request.header,
                "folder": folder.name,
                "limits": dataclasses.asdict(limits),
                "resources": dataclasses.asdict(resources),
            }
            # The request is a file, not a pipe: nobody waits for the process to read it.
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(pack(header, len(request.payload)) + request.payload)
            file.seek(0)
            process = pool.acquire() if pool else DecoderProcess.start()
            process.assign(file, fd)
        return cls(process, folder, limits, max_answer_bytes=request.max_answer_bytes, pool=pool)

    @property
    def pid(self) -> int:
        """Id of the decoder process."""
        return self._process.pid

    @property
    def silent_s(self) -> float:
        """Seconds since the last byte was read from the process."""
        return time.monotonic() - self._last_read

    def receive(self, timeout_s: float) -> tuple[Header, bytearray] | None:
        """The process's next message, or ``None`` if it is not complete within ``timeout_s``.

        Raises:
            ServiceError: sent by the process, or saying what the process died of.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = max(0.0, deadline - time.monotonic())
            if not self._readable.poll(wait_s * 1000):
                return None
            message = self._advance()
            if message is not None:
                if message[0].get("type") == "error":
                    raise ServiceError.from_dict(message[0]["error"])
                return message

    def _advance(self) -> tuple[Header, bytearray] | None:
        """Read the bytes that have come; returns the message that they complete, if any."""
        if self._header is None:
            wanted = PREFIX.size - len(self._head)
            if wanted <= 0:
                wanted = PREFIX.unpack_from(self._head)[0] + PREFIX.size - len(self._head)
            data = self._process.stdout.read(wanted)
            self._note_read(len(data or b""))
            self._head += data or b""
            self._parse_head()
        else:
            count = self._process.stdout.readinto(memoryview(self._body)[self._filled :])  # type: ignore[attr-defined]
            self._note_read(count)
            self._filled += count
        if self._header is None or self._filled < len(self._body):
            return None
        message = (self._header, self._body)
        self._head = bytearray()
        self._header = None
        self._body = bytearray()
        self._filled = 0
        return message

    def _note_read(self, count: int) -> None:
        if not count:
            raise self._explain_death()
        self._last_read = time.monotonic()

    def _parse_head(self) -> None:
        if len(self._head) < PREFIX.size:
            return
        header_bytes, payload_bytes = PREFIX.unpack_from(self._head)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_answer_bytes:
            self.kill()
            raise ServiceError(
                Reason.INTERNAL,
                f"decoder process sent a message of {header_bytes} + {payload_bytes} bytes; "
                f"at most {MAX_HEADER_BYTES} + {self._max_answer_bytes} were expected",
            )
        if len(self._head) == PREFIX.size + header_bytes:
            self._header = json.loads(self._head[PREFIX.size :])
            self._body = bytearray(payload_bytes)
            self._filled = 0

    def _explain_death(self) -> ServiceError:
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:  # controlled by its file, or stuck in the kernel
            self.kill()
            code = self._process.wait()
        if code == -signal.SIGXCPU:
            return ServiceError(
                Reason.DECODE_TIMEOUT, "decoding took more CPU time than the limits allow"
            )
        self._process.stderr.seek(0)
        tail = self._process.stderr.read()[-4000:].decode(errors="replace").strip()
        logger.warning("decoder process %d ended with code %d: %s", self.pid, code, tail)
        if "MemoryError" in tail or "bad_alloc" in tail:
            maximum = self._limits.max_memory_bytes
            return ServiceError(
                Reason.VIDEO_LIMIT_EXCEEDED,
                f"decoding the video needs more memory than max_memory_bytes = {maximum}",
                limit="max_memory_bytes",
                value=maximum,
                maximum=maximum,
            )
        if code >= 0 or self._ended_by_us:
            how = _describe_end(code)
            return ServiceError(Reason.DECODE_FAILED, f"the decoder process {how}", exit_code=code)
        return ServiceError(
            Reason.VIDEO_DECODER_KILLED,
            f"the decoder process {_describe_end(code)}; memory may be short",
            exit_code=code,
        )

    def kill(self) -> None:
        """End the process at once; does nothing if it has ended."""
        self._ended_by_us = True
        self._process.kill()

    def close(self) -> None:
        """Kill the process, wait for its end, remove its folder and release it. Idempotent."""
        self._process.close()
        self._folder.cleanup()
        if self._pool is not None:
            self._pool.release()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def blame_file(error: ServiceError) -> ServiceError:
    """What a decoder's second death at the same place says: a crash is the file's doing.

    A process that was killed from outside, as the kernel does when memory is short, says nothing
    about the file: its error stays as it is, and may be tried again.
    """
    code = int(error.metadata["exit_code"])
    if -code not in _CRASHES:
        return error
    return ServiceError(
        Reason.DECODE_FAILED, f"the decoder process {_describe_end(code)}, twice", exit_code=code
    )


def _describe_end(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
