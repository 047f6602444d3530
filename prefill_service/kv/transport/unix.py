"""The transport within one host: a Unix socket that hands over the pages' shared memory."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from prefill_service.kv.page_store import ShardStore
from prefill_service.kv.transport.base import PageConnection, PageServer, PullRequest, Transport
from prefill_service.kv.transport.unix_client import UnixConnection
from prefill_service.kv.transport.unix_server import UnixPageServer


class UnixTransport(Transport):
    """Pages are copied once, out of memory that the reader maps read-only."""

    scheme = "unix"
    example = "unix:/path"

    @override
    def serve(self, store: ShardStore, folder: Path, name: str) -> PageServer:
        return UnixPageServer(store, folder / f"{name}.sock")

    @override
    def make_connection(self, request: PullRequest) -> PageConnection:
        return UnixConnection(request)


TRANSPORT = UnixTransport()
