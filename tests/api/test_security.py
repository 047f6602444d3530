"""Who may call the server: bearer tokens, TLS, and configurations that are refused."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prefill.v1 import prefill_service_pb2 as pb
from prefill.v1 import prefill_service_pb2_grpc, video_service_pb2

from prefill_service.errors import Reason, ServiceError
from tests.support.in_process_service import answer, error_of, health

Serve = Callable[..., Any]


async def test_token_is_wanted_by_everything_but_health(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    async with serve(server={"auth_token_file": str(tmp_path / "token")}) as s:
        assert await health(s.channel) == "SERVING"
        request = pb.ListPrefillJobsRequest()
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "s3cret"),)):
            call = s.prefills.ListPrefillJobs(request, metadata=metadata)
            code, reason, _, _ = await error_of(call)
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert (await error_of(answer(s.ask())))[1] == "UNAUTHENTICATED"

        async def chunks() -> Any:
            yield video_service_pb2.UploadChunksRequest(video_id=s.video_id)

        assert (await error_of(s.videos.UploadChunks(chunks())))[1] == "UNAUTHENTICATED"
        reflection = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in reflection.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            ):
                pass
        good = (("authorization", "Bearer s3cret"),)
        await s.prefills.ListPrefillJobs(request, metadata=good)


def _certificates(folder: Path) -> None:
    """ca.pem, and server and client certificates with keys that it signed."""
    now = datetime.datetime.now(datetime.UTC)

    def make(name: str, issuer: Any, issuer_key: Any) -> Any:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                False,
            )
            .sign(issuer_key or key, hashes.SHA256())
        )
        (folder / f"{name}.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return subject, key

    issuer, key = make("ca", None, None)
    make("server", issuer, key)
    make("client", issuer, key)


async def test_tls_and_mtls(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _certificates(tmp_path)
    read = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    server = {"tls_cert": str(tmp_path / "server.pem"), "tls_key": str(tmp_path / "server.key")}
    plain = grpc.ssl_channel_credentials(read["ca.pem"])
    mutual = grpc.ssl_channel_credentials(read["ca.pem"], read["client.key"], read["client.pem"])
    async with serve(connect=False, server={**server, "host": "0.0.0.0"}) as s:
        assert "(TLS)" in s.lines[0]
        async with grpc.aio.secure_channel(s.address, plain) as channel:
            assert await health(channel) == "SERVING"
        async with grpc.aio.insecure_channel(s.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health(channel)
    monkeypatch.setenv("HOME", str(tmp_path))
    server = {"tls_cert": "~/server.pem", "tls_key": "~/server.key", "tls_client_ca": "~/ca.pem"}
    async with serve(connect=False, server=server) as s:
        async with grpc.aio.secure_channel(s.address, mutual) as channel:
            assert await health(channel) == "SERVING"
        async with grpc.aio.secure_channel(s.address, plain) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await health(channel)


async def test_renewed_certificate_and_token_are_used_without_a_restart(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _certificates(tmp_path)
    token = tmp_path / "token"
    token.write_text("first")
    files = {"tls_cert": "server.pem", "tls_key": "server.key", "auth_token_file": "token"}
    server = {name: str(tmp_path / file) for name, file in files.items()}

    async def is_admitted(authority: bytes, text: str) -> bool:
        credentials = grpc.ssl_channel_credentials(authority)
        async with grpc.aio.secure_channel(s.address, credentials) as channel:
            stub = prefill_service_pb2_grpc.PrefillServiceStub(channel)
            metadata = (("authorization", f"Bearer {text}"),)
            try:
                await stub.ListPrefillJobs(pb.ListPrefillJobsRequest(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (
                    grpc.StatusCode.UNAUTHENTICATED,
                    grpc.StatusCode.UNAVAILABLE,
                ):
                    raise
                return False
            return True

    async with serve(connect=False, server=server) as s:
        before = (tmp_path / "ca.pem").read_bytes()
        assert await is_admitted(before, "first")
        token.write_text("second")
        assert not await is_admitted(before, "first")
        assert await is_admitted(before, "second")
        token.write_text("")
        assert await is_admitted(before, "second")
        assert "the token stays as it was" in caplog.text
        (tmp_path / "server.pem").write_text("half a certificate")
        assert await is_admitted(before, "second")
        assert "the certificate stays as it was" in caplog.text
        _certificates(tmp_path)
        assert not await is_admitted(before, "second")
        assert await is_admitted((tmp_path / "ca.pem").read_bytes(), "second")


async def test_unsafe_or_broken_configuration_is_refused(serve: Serve, tmp_path: Path) -> None:
    _certificates(tmp_path)
    (tmp_path / "empty").write_text("\n")
    cert = str(tmp_path / "server.pem")
    key = str(tmp_path / "server.key")
    for server, text in (
        ({"host": "0.0.0.0"}, "not a loopback address"),
        ({"tls_cert": cert, "tls_key": str(tmp_path / "client.key")}, "cannot be used with"),
        ({"tls_cert": cert, "tls_key": "/nowhere"}, "cannot be read: No such file"),
        ({"tls_client_ca": cert}, "needs tls_cert and tls_key"),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": key}, "cannot be used"),
        ({"auth_token_file": str(tmp_path / "empty")}, "must hold one line"),
        ({"host": "no.such.host.invalid", "insecure": True}, "cannot listen on"),
    ):
        with pytest.raises(ServiceError, match=text) as error:
            async with serve(server=server):
                pass
        assert error.value.reason is Reason.CONFIG_INVALID
    async with serve(server={"host": "0.0.0.0", "insecure": True}) as s:
        assert await health(s.channel) == "SERVING"
