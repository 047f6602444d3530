"""Transport security and tokens, read once at start and checked before anything is served."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

import grpc

from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS credentials, or ``None`` for plaintext.

    Raises:
        ServiceError: CONFIG_INVALID: a file that cannot be read or used, a key that does not
            fit its certificate, a client CA without TLS, plaintext on a non-loopback address.
    """
    if not config.tls_cert:
        if config.tls_client_ca:
            raise _invalid("tls_client_ca", config.tls_client_ca, "needs tls_cert and tls_key")
        if not config.insecure and not _is_loopback(config.host):
            raise _invalid(
                "host",
                config.host,
                "is not a loopback address: give tls_cert and tls_key, or allow plaintext with "
                "--insecure",
            )
        return None
    cert = _read("tls_cert", config.tls_cert)
    key = _read("tls_key", config.tls_key)
    authority = _read("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else None
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        check.load_cert_chain(_path(config.tls_cert), _path(config.tls_key), password="")
    except (ssl.SSLError, ValueError) as error:
        text = f"cannot be used with {config.tls_key}: {error}"
        raise _invalid("tls_cert", config.tls_cert, text) from error
    if authority is not None:
        try:
            check.load_verify_locations(_path(config.tls_client_ca))
        except ssl.SSLError as error:
            raise _invalid(
                "tls_client_ca", config.tls_client_ca, f"cannot be used: {error}"
            ) from error
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=authority, require_client_auth=authority is not None
    )


def read_token(config: ServerConfig) -> str:
    """The bearer token, or an empty string if none is wanted.

    Raises:
        ServiceError: CONFIG_INVALID: unreadable, empty, or not printable ASCII.
    """
    if not config.auth_token_file:
        return ""
    token = _read("auth_token_file", config.auth_token_file).decode(errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise _invalid(
            "auth_token_file", config.auth_token_file, "must hold one line of printable ASCII"
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _path(path: str) -> Path:
    return Path(path).expanduser()


def _read(name: str, path: str) -> bytes:
    try:
        return _path(path).read_bytes()
    except OSError as error:
        raise _invalid(name, path, f"cannot be read: {error.strerror}") from error


def _invalid(name: str, value: str, text: str) -> ServiceError:
    return ServiceError(
        Reason.CONFIG_INVALID, f"server.{name} {value!r} {text}", name=f"server.{name}", value=value
    )
