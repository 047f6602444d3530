"""Unix stream sockets and JSON lines, shared by both ends of ``kv.handoff``."""

from __future__ import annotations

import json
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import MAX_LINE_BYTES

_MAX_PATH_BYTES = 107  # sun_path, without its final zero


def unix_address(path: Path) -> str:
    """Address of a socket, as ``unix_path`` reads it."""
    return f"unix:{path}"


def unix_path(address: str) -> str:
    """Path of a ``unix:/path`` address.

    Raises:
        ServiceError: HANDOFF_FAILED for any other kind of address.
    """
    if not address.startswith("unix:/"):
        raise ServiceError(
            Reason.HANDOFF_FAILED,
            f"address {address!r} is not supported; expected unix:/path",
            address=address,
        )
    return address.removeprefix("unix:")


def bind_unix(path: Path) -> socket.socket:
    """A bound, not yet listening socket that only this user may connect to.

    A stale socket file in its place is replaced.

    Raises:
        ServiceError: CONFIG_INVALID if the path is too long or cannot be bound.
    """
    length = len(os.fsencode(path))
    if length > _MAX_PATH_BYTES:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"socket path {path} has {length} bytes; at most {_MAX_PATH_BYTES}",
            path=path,
            limit=_MAX_PATH_BYTES,
        )
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        server.bind(os.fspath(path))
        path.chmod(0o600)  # before listen(): until then nobody can connect
    except OSError as error:
        server.close()
        raise ServiceError(
            Reason.CONFIG_INVALID, f"cannot bind socket {path}: {error.strerror}", path=path
        ) from error
    return server


def encode_line(message: dict[str, Any]) -> bytes:
    """One JSON object as one line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class LineReader:
    """Reads JSON lines, and the file descriptors that came with them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self.fds: list[int] = []

    def read(self) -> dict[str, Any] | None:
        """The next message; ``None`` at the end of the stream.

        Raises:
            ValueError: a line that is not a JSON object, or longer than MAX_LINE_BYTES.
            OSError: the connection broke or timed out.
        """
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > MAX_LINE_BYTES:
                raise ValueError(f"line longer than {MAX_LINE_BYTES} bytes")
            data, fds, _, _ = socket.recv_fds(self._connection, 1 << 16, 1)
            self.fds += fds
            if not data:
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"expected a JSON object, got {line[:80]!r}")
        return message

    def close(self) -> None:
        """Close descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())
