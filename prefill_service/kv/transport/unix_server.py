"""Serves a rank's pages to readers on the same host (``kv.handoff``)."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from typing_extensions import override

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.page_file import PageFile
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport.base import PageServer
from prefill_service.kv.transport.sockets import LineReader, bind_unix, encode_line, unix_address

logger = logging.getLogger(__name__)

_IDLE_S = 600.0
"""A consumer that asks for nothing this long is disconnected."""


class UnixPageServer(PageServer):
    """Threads in the worker that answer readers on a Unix socket.

    The socket file is the owner's alone (0600), replaces a stale one, and goes with ``close``.

    Args:
        store: the rank's pages.
        path: where to listen.
    """

    def __init__(self, store: ShardStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._server: socket.socket | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()

    @property
    @override
    def endpoint(self) -> str:
        return unix_address(self._path)

    @override
    def start(self) -> None:
        server = bind_unix(self._path)
        server.listen(64)
        self._server = server
        threading.Thread(
            target=self._accept, args=(server,), name="kv-page-server", daemon=True
        ).start()

    @override
    def close(self) -> None:
        self._closing.set()
        if self._server is None:
            return
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._server.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, server: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = server.accept()
            except OSError as error:
                if not self._closing.is_set():
                    # Out of descriptors, most likely: the pending consumer has to wait.
                    logger.error("page server cannot accept a connection: %s", error)
                    self._closing.wait(0.1)
                continue
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="kv-consumer", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(_IDLE_S)
        try:
            _Session(self._store, connection, self._closing).run()
        except OSError as error:
            logger.debug("consumer connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()


class _Session:
    """One consumer's connection."""

    def __init__(
        self, store: ShardStore, connection: socket.socket, closing: threading.Event
    ) -> None:
        self._store = store
        self._connection = connection
        self._closing = closing
        self._file: PageFile | None = None
        self._lease_id = ""

    def run(self) -> None:
        reader = LineReader(self._connection)
        try:
            while (message := reader.read()) is not None:
                self._answer(message)
        except ServiceError as error:
            self._refuse(error)
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(ServiceError(Reason.INVALID_REQUEST, f"malformed message: {error!r}"))
        finally:
            reader.close()

    def _answer(self, message: dict[str, Any]) -> None:
        if message["op"] == "open":
            self._lease_id = str(message["lease_id"])
            self._file, fd = self._store.open_prefix(
                str(message["prefix_id"]), int(message["generation"]), self._lease_id, self._wanted
            )
            try:
                line = encode_line({"ok": True, "segment_bytes": self._file.num_bytes})
                sent = socket.send_fds(self._connection, [line], [fd])
                self._connection.sendall(line[sent:])
            finally:
                os.close(fd)
        elif message["op"] == "pages" and self._file is not None:
            checksums = self._store.wait_sealed(
                self._file,
                self._lease_id,
                first=int(message["first"]),
                count=int(message["count"]),
                wanted=self._wanted,
            )
            self._connection.sendall(encode_line({"ok": True, "checksums": checksums}))
        else:
            raise ValueError(f"op {message['op']!r}; expected open, then pages")

    def _refuse(self, error: ServiceError) -> None:
        logger.info("consumer refused: %s", error)
        self._connection.sendall(encode_line({"ok": False, **error.to_dict()}))

    def _wanted(self) -> bool:
        """False once the consumer has hung up or the server closes."""
        if self._closing.is_set():
            return False
        poll = select.poll()
        poll.register(self._connection, select.POLLRDHUP)
        return not poll.poll(0)
