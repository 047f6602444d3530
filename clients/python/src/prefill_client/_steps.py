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
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from prefill.v1.video_service_pb2 import UploadChunksRequest
from prefill_client.errors import make_error

if TYPE_CHECKING:
    from prefill_client._upload._sources import Source

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
        self, video_id: str, source: Source, *, offset: int, size: int, chunk_bytes: int
    ) -> None:
        self.offset = offset
        self.error: Exception | None = None
        self._video_id = video_id
        self._source = source
        self._size = size
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._closed = False

    def read(self) -> UploadChunksRequest | None:
        """Return the next message, or None at the end. Blocks on the disk."""
        with self._lock:
            if self._closed or self.offset >= self._size:
                return None
            try:
                data = self._read()
            except Exception as error:  # a file object of the caller's may raise anything
                self.error = error
                return None
            request = UploadChunksRequest(offset=self.offset, data=data)
            if self._video_id:
                request.video_id = self._video_id
                self._video_id = ""
            self.offset += len(data)
            return request

    def _read(self) -> bytes:
        size = min(self._chunk_bytes, self._size - self.offset)
        data = self._source.read_at(self.offset, size)
        if not data:
            name = self._source.name
            raise make_error(
                "FILE_CHANGED",
                f"{name} has shrunk to {self.offset} of {self._size} bytes",
                metadata={"path": name},
            )
        return data

    def close(self) -> None:
        """End the stream; the source is not read any more once this returns."""
        with self._lock:
            self._closed = True
