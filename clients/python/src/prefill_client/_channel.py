"""Channel options, TLS and authentication, the same for both clients."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from prefill.v1.answer_service_pb2_grpc import AnswerServiceStub
from prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from prefill.v1.video_service_pb2_grpc import VideoServiceStub
from prefill_client._arguments import check_text, refuse

# A prefill may be silent for minutes: pings keep the connection open through NATs and
# notice a dead peer. A lost server is looked for soon, for an upload that waits to go on.
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A job carries its manifest, which grows with the video and the ranks.
    ("grpc.max_receive_message_length", 64 << 20),
]

# gRPC would ask a proxy named in the environment for this very machine, too.
NO_PROXY: list[tuple[str, Any]] = [
    ("grpc.enable_http_proxy", 0),  # grpc_proxy, https_proxy, http_proxy
    ("grpc.address_http_proxy_enabled_addresses", ""),  # GRPC_ADDRESS_HTTP_PROXY
]


@dataclass(frozen=True)
class TLS:
    """How to trust the server, and how to be known to it.

    Args:
        ca: PEM file of the CA to trust; the system's by default.
        cert: PEM file of the client's certificate chain, for mTLS.
        key: PEM file of the client's private key, for mTLS.
        server_name: name in the server's certificate, if not the address's host.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate needs both cert and key")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files.

        Raises:
            OSError: one cannot be read.
        """
        ca, cert, key = (
            None if path is None else Path(path).read_bytes()
            for path in (self.ca, self.cert, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True)
class Endpoint:
    """A server's address with what it takes to connect: token and certificates."""

    address: str
    token: str | None
    tls: TLS | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that each call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def make_channel(self, module: Any) -> Any:
        """A channel of ``module`` (``grpc`` or ``grpc.aio``); it connects at its first call."""
        options = list(CHANNEL_OPTIONS)
        if is_this_machine(self.address):
            options += NO_PROXY
        if self.tls is None:
            return module.insecure_channel(self.address, options=options)
        if self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return module.secure_channel(self.address, self.tls.credentials(), options=options)


def make_endpoint(address: str, token: str | None, tls: TLS | bool | None) -> Endpoint:
    """Check the arguments of a client.

    Raises:
        ArgumentError: the address is not text, or the token cannot be a header.
    """
    if not check_text("address", address):
        refuse("address", address, "host:port")
    if token is not None:
        check_text("token", token)
        if not token.isascii() or not token.isprintable():
            # A token is a secret: it is not shown.
            refuse("token", f"{len(token)} characters", "one line of ASCII characters")
    if isinstance(tls, bool):
        tls = TLS() if tls else None
    return Endpoint(address, token, tls)


def is_this_machine(address: str) -> bool:
    """Whether a gRPC target is a Unix socket, or addresses that this machine has for itself only.

    A name other than localhost is not looked up.
    """
    scheme, colon, rest = address.partition(":")
    scheme = scheme.lower()
    if colon and scheme in ("unix", "unix-abstract", "vsock"):
        return True
    if not colon or scheme not in ("dns", "ipv4", "ipv6"):
        rest = address
    hosts = [_host(target) for target in rest.rpartition("/")[2].split(",")]
    return all(host == "localhost" or _is_own(host) for host in hosts)


def _host(target: str) -> str:
    """The host of ``host``, ``host:port`` or ``[host]:port``, in lower case."""
    if target.startswith("["):
        return target[1:].partition("]")[0].lower()
    host, colon, _ = target.rpartition(":")
    several = ":" in host  # an IPv6 address without brackets or port
    return (host if colon and not several else target).lower()


def _is_own(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def rpc_table(channel: Any) -> dict[str, Any]:
    """Return the callables of all three services by the name of the RPC."""
    stubs: tuple[Any, ...] = (VideoServiceStub, PrefillServiceStub, AnswerServiceStub)
    return {name: rpc for stub in stubs for name, rpc in vars(stub(channel)).items()}
