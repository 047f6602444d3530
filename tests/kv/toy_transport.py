"""A transport in one file that shares no code with the Unix one: what ``docs/extending.md`` lists.

Pages travel as bytes over TCP on the loopback interface, asked for by pickled tuples.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport.base import PageConnection, PageServer, PullRequest, Transport


class ToyServer(PageServer):
    """A thread for each connection, which answers ``(bytes, checksums)`` or an error."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._listener: Listener | None = None
        self._connections: list[Connection] = []
        self._closed = threading.Event()

    @property
    @override
    def endpoint(self) -> str:
        assert self._listener is not None
        host, port = self._listener.address
        return f"tcp:{host}:{port}"

    @override
    def start(self) -> None:
        self._listener = Listener(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @override
    def close(self) -> None:
        self._closed.set()
        for connection in self._connections:
            _shut_down(connection)
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        while not self._closed.is_set():
            with suppress(OSError):
                connection = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        def wanted() -> bool:  # a reader asks for nothing while it waits: anything is its end
            return not self._closed.is_set() and not wait([connection], 0)

        with suppress(OSError, EOFError), connection:
            prefix_id, epoch, lease_id = connection.recv()
            try:
                file, fd = self._store.open_prefix(prefix_id, epoch, lease_id, wanted)
                os.close(fd)
                connection.send(file.num_pages)
                while True:
                    first, count = connection.recv()
                    checksums = self._store.wait_sealed(
                        file, lease_id, first=first, count=count, wanted=wanted
                    )
                    pages = file.pages[first : first + count]
                    raw = pages.contiguous().view(torch.uint8).numpy().tobytes()
                    connection.send((raw, checksums))
            except ServiceError as error:
                connection.send(error)


class ToyConnection(PageConnection):
    """Asks and waits."""

    def __init__(self, request: PullRequest) -> None:
        self._request = request
        self._connection: Connection | None = None
        self._interrupted = threading.Event()

    @override
    def open(self) -> None:
        manifest = self._request.manifest
        _, host, port = self._request.endpoint.split(":")
        try:
            self._connection = Client((host, int(port)))
        except OSError as error:
            raise self._request.failure(f"cannot be reached: {error}") from error
        num_pages = self._ask((manifest.prefix_id, manifest.epoch, self._request.lease_id))
        if num_pages < self._request.num_pages:
            raise ServiceError(Reason.KV_MISMATCH, f"{num_pages} pages are too few")

    @override
    def pull(self, first: int, count: int) -> tuple[np.ndarray, list[int]]:
        raw, checksums = self._ask((first, count))
        private = np.frombuffer(bytearray(raw), np.uint8)
        return private.reshape(count, self._request.manifest.layout.page_bytes), checksums

    @override
    def interrupt(self) -> None:
        self._interrupted.set()
        if self._connection is not None:
            _shut_down(self._connection)

    @override
    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _ask(self, question: tuple[Any, ...]) -> Any:
        assert self._connection is not None
        if self._interrupted.is_set():
            raise self._request.cancellation()
        try:
            self._connection.send(question)
            if not self._connection.poll(self._request.timeout_s):
                limit = f"{self._request.timeout_s:g} s"
                raise self._request.failure(f"did not answer within {limit}")
            answer = self._connection.recv()
        except (OSError, EOFError) as error:
            raise self._request.failure("closed the connection") from error
        if isinstance(answer, ServiceError):
            raise answer
        return answer


class ToyTransport(Transport):
    """Endpoints are ``tcp:host:port``."""

    scheme = "tcp"
    example = "tcp:host:port"

    @override
    def serve(self, store: ShardStore, folder: Path, name: str) -> PageServer:
        return ToyServer(store)

    @override
    def make_connection(self, request: PullRequest) -> PageConnection:
        return ToyConnection(request)


def _shut_down(connection: Connection) -> None:
    """Wake whoever waits for it, which closing the descriptor would not."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
