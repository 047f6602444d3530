"""The parent's end of a decoder child: start, read, time out, kill, explain a death."""

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
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.process import DecoderProcess
from prefill_service.video.decoder.protocol import MAX_HEADER_BYTES, PREFIX, Header, pack
from prefill_service.video.decoder.rlimits import ResourceLimits

log = logging.getLogger("prefill_service.video")

_EXIT_S = 5.0


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


class SandboxedChild:
    """One decoder child working on one file.

    The thread that makes it must live as long as the child is used (``DecoderProcess``). Reading
    is for one thread at a time; ``kill`` may come from any.

    Args:
        path: the video; opened here, passed on as a descriptor.
        request: what to do; see ``decoder.child``.
        payload: raw bytes that belong to the request.
        limits: limits the child works under.
        cpu_s: CPU seconds the child may use.
        max_payload: largest payload accepted from the child, bytes.
        spares: processes started ahead, if there are any.

    Raises:
        ServiceError: NOT_A_VIDEO.
    """

    def __init__(
        self,
        path: Path,
        request: dict[str, Any],
        payload: bytes,
        *,
        limits: VideoConfig,
        cpu_s: float,
        max_payload: int,
        spares: DecoderPool | None = None,
    ) -> None:
        self._max_payload, self._spares = max_payload, spares
        self._limits = limits
        self._head = bytearray()
        self._header: Header | None = None
        self._body = bytearray()
        self._filled = 0
        with contextlib.ExitStack() as stack:
            fd = open_video(path)
            stack.callback(os.close, fd)
            self._folder = tempfile.TemporaryDirectory(prefix="prefill-decoder-")
            header = {
                **request,
                "folder": self._folder.name,
                "limits": dataclasses.asdict(limits),
                "resources": dataclasses.asdict(
                    ResourceLimits(limits.max_memory_bytes, max(1, int(cpu_s)))
                ),
            }
            # The request is a file, not a pipe: nobody waits for the child to read it.
            given = stack.enter_context(tempfile.TemporaryFile())
            given.write(pack(header, len(payload)) + payload)
            given.seek(0)
            self._process = spares.take() if spares else DecoderProcess()
            self._process.give(given, fd)
        self._stdout = self._process.stdout
        self._readable = select.poll()  # not select(): a server has descriptors above 1024
        self._readable.register(self._stdout, select.POLLIN)
        self._last_sign = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def silent_s(self) -> float:
        """Seconds since the last byte was read from the child."""
        return time.monotonic() - self._last_sign

    def receive(self, timeout_s: float) -> tuple[Header, bytearray] | None:
        """The child's next message, or ``None`` if it is not complete within ``timeout_s``.

        Raises:
            ServiceError: sent by the child, or saying what the child died of.
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
        """Read what is there; a message if that completes one."""
        if self._header is None:
            wanted = PREFIX.size - len(self._head)
            if wanted <= 0:
                wanted = PREFIX.unpack_from(self._head)[0] + PREFIX.size - len(self._head)
            data = self._stdout.read(wanted)
            self._saw(len(data or b""))
            self._head += data or b""
            self._parse_head()
        else:
            count = self._stdout.readinto(memoryview(self._body)[self._filled :])  # type: ignore[attr-defined]
            self._saw(count)
            self._filled += count
        if self._header is None or self._filled < len(self._body):
            return None
        message = (self._header, self._body)
        self._head, self._header, self._body, self._filled = bytearray(), None, bytearray(), 0
        return message

    def _saw(self, count: int) -> None:
        if not count:
            raise self._explain_death()
        self._last_sign = time.monotonic()

    def _parse_head(self) -> None:
        if len(self._head) < PREFIX.size:
            return
        header_bytes, payload_bytes = PREFIX.unpack_from(self._head)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > self._max_payload:
            self.kill()
            raise ServiceError(
                Reason.INTERNAL,
                f"decoder process sent a message of {header_bytes} + {payload_bytes} bytes; "
                f"at most {MAX_HEADER_BYTES} + {self._max_payload} were expected",
            )
        if len(self._head) == PREFIX.size + header_bytes:
            self._header = json.loads(self._head[PREFIX.size :])
            self._body = bytearray(payload_bytes)
            self._filled = 0

    def _explain_death(self) -> ServiceError:
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:  # taken over by its file, or stuck in the kernel
            self.kill()
            code = self._process.wait()
        if code == -signal.SIGXCPU:
            return ServiceError(
                Reason.DECODE_TIMEOUT, "decoding took more CPU time than the limits allow"
            )
        self._process.stderr.seek(0)
        tail = self._process.stderr.read()[-4000:].decode(errors="replace").strip()
        log.warning("decoder process %d ended with code %d: %s", self.pid, code, tail)
        if "MemoryError" in tail or "bad_alloc" in tail:
            maximum = self._limits.max_memory_bytes
            return ServiceError(
                Reason.VIDEO_LIMIT_EXCEEDED,
                f"decoding the video needs more memory than max_memory_bytes = {maximum}",
                limit="max_memory_bytes",
                value=maximum,
                maximum=maximum,
            )
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return ServiceError(Reason.DECODE_FAILED, f"the decoder process {how}", exit_code=code)

    def kill(self) -> None:
        """End the child at once; harmless if it has ended."""
        self._process.kill()

    def close(self) -> None:
        """Kill the child, wait for it and remove its folder. Idempotent."""
        self._process.close()
        self._folder.cleanup()
        if self._spares is not None:
            self._spares.give_back()
            self._spares = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
