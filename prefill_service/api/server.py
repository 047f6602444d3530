"""The gRPC server: one port, three services of ours, health, reflection, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Mapping

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prefill.v1 import (
    answer_service_pb2,
    answer_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    video_service_pb2,
    video_service_pb2_grpc,
)

from prefill_service.api.answer_servicer import AnswerServicer
from prefill_service.api.interceptor import CallInterceptor
from prefill_service.api.prefill_servicer import PrefillServicer
from prefill_service.api.security import read_token, server_credentials
from prefill_service.api.video_servicer import VideoServicer
from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics

logger = logging.getLogger(__name__)

VIDEO, PREFILL, ANSWER = (
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (video_service_pb2, "VideoService"),
        (prefill_service_pb2, "PrefillService"),
        (answer_service_pb2, "AnswerService"),
    )
)
LIVENESS = "liveness"
"""Health name that says no more than that the process serves; "" says that all is ready."""

_HEALTH_POLL_S = 0.25
_CANCEL_S = 5.0
"""How long cancelled calls may take to clean up."""

OPTIONS = [
    ("grpc.so_reuseport", 0),  # two services on one port would each get half of the calls
    # A prefill is silent for minutes. Clients may ping every second meanwhile, and beyond that
    # they are not cut off either; we ping too, to notice clients that vanished.
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class ApiServer:
    """Serves the API.

    Args:
        ready: the services' readiness by full name, asked four times a second.
        metrics: told of each call.

    Raises:
        ServiceError: CONFIG_INVALID for bad TLS files or token, or plaintext on a public address.
    """

    def __init__(
        self,
        config: ServerConfig,
        videos: VideoServicer,
        prefills: PrefillServicer,
        answers: AnswerServicer,
        ready: Callable[[], Mapping[str, bool]],
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._ready = ready
        self._credentials = server_credentials(config)
        self._calls = CallInterceptor(config.max_concurrent_calls, metrics, read_token(config))
        self._server = grpc.aio.server(interceptors=[self._calls], options=OPTIONS)
        video_service_pb2_grpc.add_VideoServiceServicer_to_server(videos, self._server)  # type: ignore[no-untyped-call]
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(prefills, self._server)  # type: ignore[no-untyped-call]
        answer_service_pb2_grpc.add_AnswerServiceServicer_to_server(answers, self._server)  # type: ignore[no-untyped-call]
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (VIDEO, PREFILL, ANSWER, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._health_task: asyncio.Task[None] | None = None

    def bind(self) -> int:
        """Bind the port; returns it. No call is answered before ``start``.

        Raises:
            ServiceError: PORT_IN_USE; CONFIG_INVALID for an address that cannot be bound.
        """
        host, port = self._config.host, self._config.port
        address = f"[{host}]:{port}" if ":" in host and "[" not in host else f"{host}:{port}"
        try:
            if self._credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, self._credentials))
        except RuntimeError as error:
            raise _bind_error(host.strip("[]"), port, error) from error

    async def start(self) -> None:
        """Begin to serve; health follows the services' readiness."""
        await self.update_health()
        await self._server.start()
        self._health_task = asyncio.create_task(self._follow_health(), name="health")

    async def drain(self, drain_s: float, at_once: asyncio.Event) -> None:
        """Turn NOT_SERVING, refuse new calls, and give running ones up to ``drain_s``.

        Returns as soon as none runs, time is up, or ``at_once`` is set.
        """
        await self._health.enter_graceful_shutdown()
        if self._calls.running:
            logger.info("draining: %d calls may go on for %g s", self._calls.running, drain_s)
        waits = {
            asyncio.create_task(self._calls.drained(drain_s)),
            asyncio.create_task(at_once.wait()),
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.wait(waits)

    async def stop(self) -> None:
        """Cancel what still runs and close the port."""
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.wait({self._health_task})
        await self._server.stop(grace=None)
        await self._calls.drained(_CANCEL_S)

    async def update_health(self) -> None:
        """Set the health now rather than at the next poll."""
        ready = self._ready()
        for name, value in {**ready, "": all(ready.values()), LIVENESS: True}.items():
            await self._health.set(name, _status(value))

    async def _follow_health(self) -> None:
        while True:
            await self.update_health()
            await asyncio.sleep(_HEALTH_POLL_S)


def _status(ready: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    status = health_pb2.HealthCheckResponse
    return status.SERVING if ready else status.NOT_SERVING


def _bind_error(host: str, port: int, cause: RuntimeError) -> ServiceError:
    """gRPC does not say why it could not bind; a plain socket does."""
    reason, text = Reason.CONFIG_INVALID, str(cause)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = Reason.PORT_IN_USE
    return ServiceError(
        reason, f"cannot listen on {host}:{port}: {text}", host=host, port=port, cause=text
    )
