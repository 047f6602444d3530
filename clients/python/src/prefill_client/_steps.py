"""The steps that a flow asks its driver to take.

Everything the client decides (retries, resumption, paging, what an event means) is written
once, as generators that yield steps and get results sent back: *flows*. They do no input or
output and know nothing of threads or event loops. Two small drivers, ``_sync`` and ``_async``,
execute the steps. A step that fails with a gRPC error has the ``PrefillError`` thrown into
the flow at its ``yield``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias, TypeVar

from prefill.v1.video_service_pb2 import UploadChunksRequest
from prefill_client.errors import PrefillError, make_error

T = TypeVar("T")
Flow: TypeAlias = Generator["Step", Any, T]
Report: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class Call:
    """Make a unary call; the result is the response."""

    rpc: str
    request: Any
    timeout: float | None


@dataclass(frozen=True)
class Open:
    """Start a server stream; the result is a ``Stream``."""

    rpc: str
    request: Any
    timeout: float | None


@dataclass(frozen=True)
class Stream:
    """A server stream under way."""

    call: Any
    request: Any


@dataclass(frozen=True)
class Next:
    """Read one message of a stream; the result is None at its end."""

    stream: Stream

    @property
    def request(self) -> Any:
        """The request that started the stream."""
        return self.stream.request


@dataclass(frozen=True)
class Send:
    """Run UploadChunks over ``chunks``; the result is the response.

    The driver calls ``report(bytes sent)`` now and then, from the caller's thread or loop.
    """

    chunks: FileChunks
    report: Report

    @property
    def request(self) -> None:
        """None: an upload is many messages, and there is no single request."""


@dataclass(frozen=True)
class Sleep:
    """Wait for ``seconds``, or until the call is cancelled."""

    seconds: float


@dataclass(frozen=True)
class Blocking:
    """Run a function that blocks on the disk; the result is what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Hand a value to whoever iterates over the flow."""

    value: Any


Action: TypeAlias = Call | Open | Next | Send | Sleep | Blocking
Step: TypeAlias = Action | Emit


class FileChunks:
    """The rest of a file as upload messages, read as gRPC asks for them.

    gRPC swallows what a request iterator raises, so a failure to read is kept in ``error``
    and the stream ends early: the server commits what it has got.
    """

    def __init__(
        self, video_id: str, path: str, *, offset: int, size: int, chunk_bytes: int
    ) -> None:
        self.offset = offset
        self.error: OSError | PrefillError | None = None
        self._video_id = video_id
        self._path = path
        self._size = size
        self._chunk_bytes = chunk_bytes
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        self._closed = False

    def read(self) -> UploadChunksRequest | None:
        """Return the next message, or None at the end. Blocks on the disk."""
        with self._lock:
            if self._closed or self.offset >= self._size:
                return None
            try:
                data = self._read()
            except (OSError, PrefillError) as error:
                self.error = error
                return None
            request = UploadChunksRequest(offset=self.offset, data=data)
            if self._video_id:
                request.video_id = self._video_id
                self._video_id = ""
            self.offset += len(data)
            return request

    def _read(self) -> bytes:
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 - closed by close()
            self._file.seek(self.offset)
        data = self._file.read(min(self._chunk_bytes, self._size - self.offset))
        if not data:
            raise make_error(
                "FILE_CHANGED",
                f"{self._path} has shrunk to {self.offset} of {self._size} bytes",
                metadata={"path": self._path},
            )
        return data

    def close(self) -> None:
        """Close the file and end the stream."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._file.close()
