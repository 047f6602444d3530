"""The reader's end of the Unix transport (``kv.handoff``): a socket and a mapping of the pages."""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import threading
from contextlib import suppress
from typing import Any

import numpy as np
from typing_extensions import override

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.transport.base import PageConnection, PullRequest
from prefill_service.kv.transport.sockets import LineReader, encode_line, unix_path

_CONNECT_TIMEOUT_S = 10.0


class UnixConnection(PageConnection):
    """Copies pages out of a rank's shared memory, which is mapped read-only."""

    def __init__(self, request: PullRequest) -> None:
        self._request = request
        self._lock = threading.Lock()
        self._interrupted = False
        self._socket: socket.socket | None = None
        self._reader: LineReader | None = None
        self._memory: mmap.mmap | None = None

    @override
    def open(self) -> None:
        connection = self._connect()
        connection.settimeout(self._request.timeout_s)
        self._reader = LineReader(connection)
        try:
            answer = self._ask(
                {
                    "op": "open",
                    "prefix_id": self._request.manifest.prefix_id,
                    "generation": self._request.manifest.epoch,
                    "lease_id": self._request.lease_id,
                }
            )
            self._memory = self._map(self._reader.fds, int(answer["segment_bytes"]))
        finally:
            self._reader.close()

    @override
    def pull(self, first: int, count: int) -> tuple[np.ndarray, list[int]]:
        assert self._memory is not None
        answer = self._ask({"op": "pages", "first": first, "count": count})
        page_bytes = self._request.manifest.layout.page_bytes
        private = np.frombuffer(
            self._memory, np.uint8, count * page_bytes, first * page_bytes
        ).copy()
        return private.reshape(count, page_bytes), answer["checksums"]

    @override
    def interrupt(self) -> None:
        with self._lock:
            self._interrupted = True
            connection = self._socket
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @override
    def close(self) -> None:
        # Unmapped here and not by the garbage collector: a caught exception's traceback would
        # keep the rank's memory alive.
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        if self._socket is not None:
            self._socket.close()

    def _connect(self) -> socket.socket:
        request = self._request
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock:
            self._socket = connection
        connection.settimeout(_CONNECT_TIMEOUT_S)
        try:
            connection.connect(unix_path(request.endpoint))
        except OSError as error:
            raise request.failure(
                f"cannot be reached at {request.endpoint}: {error.strerror or error}"
            ) from error
        # An interrupt before the socket was connected could not shut it down.
        with self._lock:
            if self._interrupted:
                raise request.cancellation()
        return connection

    def _map(self, fds: list[int], size: int) -> mmap.mmap:
        request = self._request
        if not fds:
            raise request.failure("sent no memory with its answer")
        needed = request.manifest.layout.page_bytes * request.num_pages
        # A file that can shrink could kill this process with SIGBUS while it reads.
        sealed = bool(fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        actual = os.fstat(fds[0]).st_size
        if not sealed or actual != size or size < needed:
            raise ServiceError(
                Reason.KV_MISMATCH,
                f"rank {request.rank} offers {actual} bytes of shared memory (announced {size}, "
                f"sealed: {sealed}); the manifest needs {needed}",
                rank=request.rank,
                bytes=actual,
                needed=needed,
            )
        return mmap.mmap(fds[0], size, prot=mmap.PROT_READ)

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        assert self._socket is not None
        assert self._reader is not None
        try:
            self._socket.sendall(encode_line(message))
            answer = self._reader.read()
        except TimeoutError as error:
            raise request.failure(
                f"did not answer {message} within {request.timeout_s:g} s"
            ) from error
        if answer is None:
            raise request.failure("closed the connection (process gone?)")
        if not answer.get("ok"):
            refusal = ServiceError.from_dict(answer)
            refusal.metadata.setdefault("rank", str(request.rank))
            raise refusal
        return answer
