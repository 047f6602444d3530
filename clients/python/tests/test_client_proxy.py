from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from client_helpers import Api, make_client

from prefill_client import RetryPolicy, UnavailableError

DEAD = "http://127.0.0.1:9"


@pytest.fixture
def dead_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, DEAD)
    # gRPC's own proxy by address goes to whatever it is switched on for.
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY", "127.0.0.1:9")
    monkeypatch.setenv("GRPC_ADDRESS_HTTP_PROXY_ENABLED_ADDRESSES", "127.0.0.0/8,::1/128")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:{port}",
        "LocalHost:{port}",
        "dns:localhost:{port}",
        "dns:///localhost:{port}",
        "127.0.0.1:{port}",
        "[::1]:{port}",
        "0.0.0.0:{port}",
        "[::ffff:127.0.0.1]:{port}",
        "ipv4:127.0.0.1:{port}",
        "ipv4:127.0.0.1:{port},127.0.0.2:{port}",
        "{unix}",
    ],
)
async def test_this_machine_is_never_asked_through_a_proxy(server, dead_proxies, kind, address):
    client = make_client(kind, address.format(port=server.port, unix=server.unix_address))
    assert await Api(client).collect("videos") == []


class Proxy:
    """Takes one connection, and refuses what it asks for."""

    def __init__(self) -> None:
        self.request = ""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            self.request = connection.recv(4096).decode()
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def close(self) -> None:
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.mark.parametrize(
    "address",
    [
        "prefill.example:50051",
        "localhost.example:50051",
        "127.0.0.1.example:50051",
        "10.1.2.3:50051",
        "dns:///[2001:db8::1]:50051",
    ],
)
async def test_another_machine_is_asked_through_the_proxy(kind, proxy, monkeypatch, address):
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    once = RetryPolicy(attempts=1)
    client = make_client(kind, address, retry=once, timeout=10.0)
    with pytest.raises(UnavailableError):
        await Api(client).collect("videos")
    assert proxy.request.startswith(f"CONNECT {address.rpartition('/')[2]} ")
