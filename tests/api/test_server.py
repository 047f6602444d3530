"""The gRPC server itself: security, health, reflection, keepalive, drain, ports."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prefill.v1 import prefill_service_pb2 as pb
from prefill.v1 import video_service_pb2

from prefill_service.errors import Reason, ServiceError
from tests.support.in_process_service import answer, error_of, serving
from tests.support.simulated_backends import SimulatedExecutor, SimulatedGenerationServer

Serve = Callable[..., Any]
SERVICES = [f"prefill.v1.{name}Service" for name in ("Answer", "Prefill", "Video")]


async def health(channel: grpc.aio.Channel, service: str = "") -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


async def test_reflection_lists_the_services(serve: Serve) -> None:
    async with serve() as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)

        async def requests() -> Any:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        replies = [reply async for reply in stub.ServerReflectionInfo(requests())]
        names = [service.name for service in replies[0].list_services_response.service]
        assert sorted(names) == sorted(
            [*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
        )


async def test_reflection_can_be_turned_off(serve: Serve) -> None:
    async with serve(server={"reflection": False}) as s:
        stub = reflection_pb2_grpc.ServerReflectionStub(s.channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in stub.ServerReflectionInfo(iter([])):
                pass
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_follows_group_and_decoder(tmp_path: Path, template: Any) -> None:
    group = SimulatedExecutor(start_s=0.5, restart_s=0.5)
    decoder = SimulatedGenerationServer(group, start_s=1.2)
    async with serving(tmp_path / "data", template, group, decoder, wait=False) as s:
        prefill = "prefill.v1.PrefillService"
        ans = "prefill.v1.AnswerService"
        video = SERVICES[2]

        async def all_of() -> list[str]:
            return [await health(s.channel, n) for n in ("", prefill, ans, video, "liveness")]

        up = "SERVING"
        down = "NOT_SERVING"

        async def until(expected: list[str]) -> None:
            async with asyncio.timeout(3):
                while await all_of() != expected:
                    await asyncio.sleep(0.05)

        await until([down, down, down, up, up])  # uploads are possible while models load
        await until([down, up, down, up, up])
        await until([up, up, up, up, up])
        s.executor.die()
        await until([down, down, down, up, up])
        await until([up, up, up, up, up])
        s.generation.die()
        await until([down, up, down, up, up])
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health(s.channel, "nothing")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


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


async def test_port_in_use(serve: Serve, tmp_path: Path, template: Any) -> None:
    async with serve() as s:
        port = s.service.port
        with pytest.raises(ServiceError) as error:
            async with serving(tmp_path / "other", template, server={"port": port}):
                pass
        assert error.value.reason is Reason.PORT_IN_USE
        assert f"127.0.0.1:{port}: Address already in use" in str(error.value)
        assert await health(s.channel) == "SERVING"
    async with serve(server={"port": port}) as s:  # free again at once
        assert await health(s.channel) == "SERVING"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServiceError, match="in use"):
        async with serve(server={"port": port}):
            pass


async def test_data_dir_in_use(serve: Serve) -> None:
    async with serve():
        with pytest.raises(ServiceError, match="is in use by another") as error:
            async with serve():
                pass
        assert error.value.reason is Reason.CONFIG_INVALID


async def test_failed_start_of_a_part_ends_the_service(tmp_path: Path, template: Any) -> None:
    async with serving(tmp_path / "data", template) as s:
        s.executor.step_s = 30
        job_id = (await s.create()).job_id
        await s.until(lambda: bool(s.executor.started))

    class Broken(SimulatedExecutor):
        async def start(self) -> None:
            raise ServiceError(Reason.MODEL_INVALID, "config.json is missing")

        async def wait_ready(self) -> None:
            await self.start()

    group = Broken()
    decoder = SimulatedGenerationServer(group, start_s=60)
    begin = time.monotonic()
    with pytest.raises(ServiceError, match=r"config\.json is missing"):
        async with serving(tmp_path / "data", template, group, decoder):
            pass
    assert time.monotonic() - begin < 5
    async with serving(tmp_path / "data", template) as s:  # and the queue is as it was
        assert (await s.ended(job_id))[-1].state == pb.JOB_STATE_SUCCEEDED


async def test_silent_call_survives_client_keepalive(serve: Serve) -> None:
    options = [
        ("grpc.keepalive_time_ms", 1000),
        ("grpc.keepalive_timeout_ms", 2000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with serve(connect=False) as s:
        s.executor.step_s = 10  # and two frames are one step
        async with grpc.aio.insecure_channel(s.address, options=options) as channel:
            s.connect(channel)
            job = await s.create(frames=2)
            await s.until(lambda: bool(s.executor.started))
            begin = time.monotonic()
            jobs = await s.ended(job.job_id)
            assert time.monotonic() - begin > 9
            assert len(jobs) <= 3
            assert jobs[-1].state == pb.JOB_STATE_SUCCEEDED


async def test_too_many_calls(serve: Serve) -> None:
    async with serve(server={"max_concurrent_calls": 2}) as s:
        s.executor.step_s = 30
        calls = [s.ask(), s.ask()]
        for call in calls:
            await call.read()
        code, reason, metadata, details = await error_of(s.get("job_x"))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert metadata == {"limit": "2"}
        assert "RetryInfo" in details
        assert await health(s.channel) == "SERVING"
        calls[0].cancel()
        await asyncio.sleep(0.2)
        assert (await error_of(s.get("job_x")))[1] == "UNKNOWN_JOB"


async def test_drain_lets_answers_end_and_refuses_new_ones(serve: Serve) -> None:
    async with serve() as s:
        await answer(s.ask())
        s.generation.token_s = 0.3
        s.executor.step_s = 30
        reading = asyncio.create_task(answer(s.ask()))
        job = await s.create(frames=30)
        watching = asyncio.create_task(error_of(s.ended(job.job_id)))
        await s.until(lambda: len(s.generation.requests) == 2 and len(s.executor.started) == 2)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert await health(s.channel) == "NOT_SERVING"
        assert await health(s.channel, "liveness") == "NOT_SERVING"
        code, reason, _, details = await error_of(s.create(frames=12))
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert "RetryInfo" in details
        assert (await reading).text == "A red car."
        assert (await watching)[1] == "SHUTTING_DOWN"
        async with asyncio.timeout(3):
            await s.task


async def test_drain_time_is_bounded(serve: Serve) -> None:
    async with serve(server={"drain_seconds": 0.5}) as s:
        s.executor.step_s = 30
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: bool(s.generation.requests))
        begin = time.monotonic()
        s.service.shut_down()
        async with asyncio.timeout(5):
            await s.task
        assert 0.4 < time.monotonic() - begin < 3
        code, *_ = await reading
        assert code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        assert len(s.executor.stopped) == 1
        assert s.executor.open_leases == 0


async def test_second_signal_stops_at_once(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 30
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: bool(s.generation.requests))
        begin = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.3)
        assert not s.task.done()
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(5):
            await s.task
        assert time.monotonic() - begin < 2
        await reading
        assert len(s.executor.stopped) == 1


async def test_signal_during_start(tmp_path: Path, template: Any) -> None:
    group = SimulatedExecutor(start_s=60)
    async with serving(tmp_path / "data", template, group, wait=False) as s:
        begin = time.monotonic()
        s.service.shut_down()
        async with asyncio.timeout(5):
            await s.task
        assert time.monotonic() - begin < 2
        assert s.lines == []


async def test_internal_errors_are_logged_under_an_id(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefill_service.scheduling.job_registry import JobRegistry

    def broken(self: JobRegistry, job_id: str) -> None:
        raise KeyError("secret")

    async with serve() as s:
        monkeypatch.setattr(JobRegistry, "get_record", broken)
        code, reason, metadata, _ = await error_of(s.get("job_x"))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert metadata["error_id"] in caplog.text
        assert "secret" in caplog.text


async def test_one_log_line_per_call(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="prefill_service.api.interceptor")
    async with serve() as s:
        job_id = (await answer(s.ask())).final.job_id
        await error_of(s.get("job_x\nforged"))
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("interceptor")]
    assert len(lines) == 2
    assert lines[0].startswith("AnswerService/Ask OK ")
    assert f"video_id={s.video_id} job_id={job_id}" in lines[0]
    assert lines[1].startswith("PrefillService/GetPrefillJob NOT_FOUND ")
    assert all("\n" not in line for line in lines)


async def test_long_input_in_an_error_does_not_break_the_call(serve: Serve) -> None:
    async with serve() as s:
        code, reason, _, _ = await error_of(s.get("\N{GRINNING FACE}" * 20_000))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB")
