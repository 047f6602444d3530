"""The gRPC server itself: reflection, health, keepalive, ports, limits, logs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.errors import Reason, ServiceError
from tests.support.in_process_service import answer, error_of, health, serving
from tests.support.simulated_backends import SimulatedExecutor, SimulatedGenerationServer

Serve = Callable[..., Any]
SERVICES = [f"prefill.v1.{name}Service" for name in ("Answer", "Prefill", "Video")]


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


PREFACE_BYTES = 24
PING = 6


class PingCounter:
    """A relay to a gRPC server that counts the client's pings."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.pings = 0

    async def relay(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        server, forth = await asyncio.open_connection("127.0.0.1", self._port)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._copy(server, back))
            forth.write(await client.readexactly(PREFACE_BYTES))
            with suppress(asyncio.IncompleteReadError):
                while True:  # HTTP/2: three bytes of length, one of type, five more
                    head = await client.readexactly(9)
                    acknowledges = head[4] & 1
                    self.pings += head[3] == PING and not acknowledges
                    forth.write(head + await client.readexactly(int.from_bytes(head[:3])))
                    await forth.drain()
            forth.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()


async def test_silent_call_survives_client_keepalive(serve: Serve) -> None:
    """By default a gRPC server hangs up after two pings without data."""
    options = [
        ("grpc.keepalive_time_ms", 100),
        ("grpc.keepalive_timeout_ms", 60_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with serve(connect=False) as s:
        s.executor.step_s = 3600
        counter = PingCounter(s.service.port)
        relay = await asyncio.start_server(counter.relay, "127.0.0.1", 0)
        address = f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        async with relay, grpc.aio.insecure_channel(address, options=options) as channel:
            s.connect(channel)
            job = await s.create(frames=2)
            watching = asyncio.create_task(s.ended(job.job_id))
            await s.until(lambda: bool(s.executor.started))
            before = counter.pings
            await s.until(lambda: counter.pings >= before + 4)
            assert not watching.done()
            await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=job.job_id))
            jobs = await watching
            assert len(jobs) <= 3
            assert jobs[-1].state == pb.JOB_STATE_CANCELLED


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
        code, reason, metadata, _ = await error_of(s.get("\N{GRINNING FACE}" * 20_000))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert metadata["value"] == "80000 bytes long"
        code, reason, _, _ = await error_of(s.get("\N{GRINNING FACE}" * 16))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB")
