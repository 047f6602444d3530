"""Transport security and tokens: checked before anything is served, and read again when changed.

A certificate is renewed and a token exchanged by writing their files: what comes after that is
held to the new ones, and no connection is closed. Files that cannot be used are left aside, with
a warning, until they change again.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import ssl
from pathlib import Path

import grpc

from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError

logger = logging.getLogger(__name__)


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """TLS credentials that follow their files, or ``None`` for plaintext.

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
    certificates = _Certificates(config)
    # The stubs forget that ``None`` may come, for "as before".
    return grpc.dynamic_ssl_server_credentials(
        certificates.load(),
        certificates.load_if_changed,  # type: ignore[arg-type]
        require_client_authentication=bool(config.tls_client_ca),
    )


class BearerToken:
    """The token that clients must send, if ``server.auth_token_file`` names one."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._files = _WatchedFiles(config.auth_token_file)
        self._token = b""

    def load(self) -> None:
        """Read the file.

        Raises:
            ServiceError: CONFIG_INVALID: unreadable, empty, or not printable ASCII.
        """
        if not self._config.auth_token_file:
            return
        text = _read("auth_token_file", self._config.auth_token_file)
        token = text.decode(errors="replace").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise _invalid(
                "auth_token_file",
                self._config.auth_token_file,
                "must hold one line of printable ASCII",
            )
        self._token = token.encode()

    def admits(self, authorization: str) -> bool:
        """Whether a call with this header may pass; takes equally long for all wrong ones."""
        if self._files.changed():
            try:
                self.load()
            except ServiceError as error:
                logger.warning("the token stays as it was: %s", error)
        if not self._token:
            return True
        return hmac.compare_digest(authorization.encode(), b"Bearer " + self._token)


class _Certificates:
    """The server's certificate and key, and the client CA for mTLS."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._files = _WatchedFiles(config.tls_cert, config.tls_key, config.tls_client_ca)

    def load(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files.

        Raises:
            ServiceError: CONFIG_INVALID: a file that cannot be read or used, a key that does not
                fit its certificate.
        """
        config = self._config
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
                text = f"cannot be used: {error}"
                raise _invalid("tls_client_ca", config.tls_client_ca, text) from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=authority)

    def load_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks before each handshake; ``None`` lets it go on with what it has."""
        if not self._files.changed():
            return None
        try:
            found = self.load()
        except ServiceError as error:
            logger.warning("the certificate stays as it was: %s", error)
            return None
        logger.info("new certificate read from %s", self._config.tls_cert)
        return found


class _WatchedFiles:
    """Files that somebody may replace. Empty names are none."""

    def __init__(self, *names: str) -> None:
        self._paths = [_path(name) for name in names if name]
        self._seen = self._stamps()

    def changed(self) -> bool:
        """Whether one has changed since the last call, or since the start."""
        seen = self._stamps()
        changed = seen != self._seen
        self._seen = seen
        return changed

    def _stamps(self) -> list[tuple[int, int, int] | None]:
        """(inode, size, time of change) of each; ``None`` for one that is not there."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return found


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
