"""What every RPC must do, whichever service it belongs to, checked over a real socket."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from prefill_service.api.grpc_server import ApiServer
from prefill_service.api.servicer import ServedService, Servicer
from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics
from tests.support.in_process_service import error_of

NOT_FOUND = ServiceError(Reason.UNKNOWN_VIDEO, "there is no such video", video_id="vid_x")


class Backend:
    """What a servicer calls: any method, at any depth of attributes.

    A call raises ``error`` at once if there is one. Otherwise it waits, awaited or iterated, until
    ``released`` is set, and raises NOT_FOUND then.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.entered = asyncio.Event()
        self.released = asyncio.Event()
        self.cancelled = asyncio.Event()

    def __getattr__(self, name: str) -> Backend:
        return self

    def __call__(self, *arguments: Any, **named: Any) -> Backend:
        if self.error is not None:
            raise self.error
        return self

    def __await__(self) -> Any:
        return self._wait().__await__()

    def __aiter__(self) -> Backend:
        return self

    async def __anext__(self) -> Any:
        return await self._wait()

    async def aclose(self) -> None:
        """As of a generator; it holds nothing."""

    async def _wait(self) -> Any:
        self.entered.set()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise NOT_FOUND


@dataclass(frozen=True)
class RpcCase:
    """One method of a service, and how to call it.

    Attributes:
        make_servicer: the service's servicer, calling the given backend.
        method: the method.
        request: a request that its servicer accepts.
        waits: whether it waits for its backend; the others answer from memory.
    """

    make_servicer: Callable[[Any], Servicer]
    method: MethodDescriptor
    request: Message
    waits: bool = True

    def __str__(self) -> str:
        return self.method.name


class Connection:
    """A server with the case's service, and a client of it."""

    def __init__(self, case: RpcCase, server: ApiServer, channel: grpc.aio.Channel) -> None:
        self.case = case
        self.server = server
        self.channel = channel

    async def call(self, request: Message | None = None, timeout_s: float = 10) -> Any:
        """Call the method, and read its answer to the end."""
        method = self.case.method
        message = self.case.request if request is None else request
        name = f"/{method.containing_service.full_name}/{method.name}"
        requests = "stream" if method.client_streaming else "unary"
        responses = "stream" if method.server_streaming else "unary"
        stub = getattr(self.channel, f"{requests}_{responses}")(
            name,
            request_serializer=type(message).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = stub(iter([message]) if method.client_streaming else message, timeout=timeout_s)
        if method.server_streaming:
            return [response async for response in answer]
        return await answer


@asynccontextmanager
async def connected(
    case: RpcCase, backend: Any, metrics: Metrics | None = None
) -> AsyncIterator[Connection]:
    services = [ServedService(case.make_servicer(backend))]
    server = ApiServer(ServerConfig(port=0), services, metrics or Metrics())
    port = server.bind()
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Connection(case, server, channel)
    finally:
        await server.stop()


def methods_of(service: ServiceDescriptor) -> list[MethodDescriptor]:
    return list(service.methods)


async def check_errors_are_mapped(case: RpcCase) -> None:
    """A ServiceError arrives whole, anything else as INTERNAL under an id; both are counted."""
    metrics = Metrics()
    async with connected(case, Backend(NOT_FOUND), metrics) as connection:
        code, reason, metadata, _ = await error_of(connection.call())
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIDEO")
    assert metadata == {"video_id": "vid_x"}
    service = case.method.containing_service.name
    labels = {"method": f"{service}/{case.method.name}", "code": "NOT_FOUND"}
    assert metrics.registry.get_sample_value("prefill_calls_total", labels) == 1
    async with connected(case, Backend(KeyError("secret"))) as connection:
        code, reason, metadata, _ = await error_of(connection.call())
    assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert metadata["error_id"]


async def check_request_id(case: RpcCase) -> None:
    """A request's id comes back in errors, and must be a UUID."""
    if "request_id" not in case.method.input_type.fields_by_name:
        return
    async with connected(case, Backend(NOT_FOUND)) as connection:
        request = type(case.request)()
        request.CopyFrom(case.request)
        request.request_id = str(uuid.uuid4())
        _, reason, _, details = await error_of(connection.call(request))
        assert (reason, "RequestInfo" in details) == ("UNKNOWN_VIDEO", True)
        request.request_id = "17"
        code, reason, _, _ = await error_of(connection.call(request))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")


async def check_deadline_ends_the_work(case: RpcCase) -> None:
    """When a call's deadline has passed, what it waits for is cancelled."""
    if not case.waits:
        return
    backend = Backend()
    async with connected(case, backend) as connection:
        code, *_ = await error_of(connection.call(timeout_s=0.3))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(5):
            await backend.cancelled.wait()


async def check_drain(case: RpcCase) -> None:
    """A draining server refuses new calls and lets running ones end by themselves."""
    backend = Backend()
    async with connected(case, backend) as connection:
        running = asyncio.create_task(error_of(connection.call()))
        if case.waits:
            await asyncio.wait_for(backend.entered.wait(), 5)
        else:
            await running
        draining = asyncio.create_task(connection.server.drain(10, asyncio.Event()))
        await asyncio.sleep(0.1)
        code, reason, _, details = await error_of(connection.call())
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert "RetryInfo" in details
        assert draining.done() is not case.waits
        backend.released.set()
        async with asyncio.timeout(5):
            if case.waits:
                assert (await running)[1] == "UNKNOWN_VIDEO"
            await draining


async def check_service_is_announced(case: RpcCase) -> None:
    """Health knows the service and reflection lists it."""
    name = case.method.containing_service.full_name
    async with connected(case, Backend()) as connection:
        health = health_pb2_grpc.HealthStub(connection.channel)
        status = (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(connection.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [reply] = [reply async for reply in stub.ServerReflectionInfo(iter([request]))]
        assert name in [service.name for service in reply.list_services_response.service]


CHECKS = (
    check_errors_are_mapped,
    check_request_id,
    check_deadline_ends_the_work,
    check_drain,
    check_service_is_announced,
)
