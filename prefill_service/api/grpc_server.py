"""The gRPC server: one port, the services that it is given, health, reflection, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from prefill_service.api.interceptor import CallInterceptor
from prefill_service.api.security import BearerToken, server_credentials
from prefill_service.api.servicer import ServedService
from prefill_service.config import ServerConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics

logger = logging.getLogger(__name__)

LIVENESS = "liveness"
"""Health name that is SERVING as long as the process serves; "" needs every service ready."""

_HEALTH_POLL_S = 0.25
_CANCEL_S = 5.0
"""How long cancelled calls may take to clean up, seconds."""

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
        config: address, security and limits.
        services: what to serve; health and reflection come with it.
        metrics: counts the calls.
    """

    def __init__(
        self, config: ServerConfig, services: Sequence[ServedService], metrics: Metrics
    ) -> None:
        self._config = config
        self._services = services
        self._token = BearerToken(config)
        self._calls = CallInterceptor(config, metrics, self._token)
        self._server = grpc.aio.server(interceptors=[self._calls], options=OPTIONS)
        for service in services:
            service.servicer.register_handlers(self._server)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            ours = [service.servicer.service_name for service in services]
            names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._health_task: asyncio.Task[None] | None = None

    def bind(self) -> int:
        """Read token and certificates and bind the port; returns it.

        No call is answered before ``start``.

        Raises:
            ServiceError: CONFIG_INVALID for bad TLS files or token, plaintext on a public address,
                or an address that cannot be bound; PORT_IN_USE.
        """
        credentials = server_credentials(self._config)
        self._token.load()
        host = self._config.host
        port = self._config.port
        address = f"[{host}]:{port}" if ":" in host and "[" not in host else f"{host}:{port}"
        try:
            if credentials is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, credentials))
        except RuntimeError as error:
            raise _bind_error(host.strip("[]"), port, error) from error

    async def start(self) -> None:
        """Begin to serve; health follows the readiness of the services."""
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
        self._calls.cut_off_calls()
        await self._calls.drained(_CANCEL_S)
        await self._server.stop(grace=None)
        await self._calls.drained(_CANCEL_S)

    async def update_health(self) -> None:
        """Set the health now rather than at the next poll."""
        ready = {service.servicer.service_name: service.is_ready() for service in self._services}
        for name, value in {**ready, "": all(ready.values()), LIVENESS: True}.items():
            await self._health.set(name, _health_status(value))

    async def _follow_health(self) -> None:
        while True:
            await self.update_health()
            await asyncio.sleep(_HEALTH_POLL_S)


def _health_status(ready: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    status = health_pb2.HealthCheckResponse
    return status.SERVING if ready else status.NOT_SERVING


def _bind_error(host: str, port: int, cause: RuntimeError) -> ServiceError:
    """gRPC does not say why it could not bind; a plain socket does."""
    reason = Reason.CONFIG_INVALID
    text = str(cause)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as test:
            test.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            test.bind(address)
            test.listen()
    except OSError as error:
        text = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            reason = Reason.PORT_IN_USE
    return ServiceError(
        reason, f"cannot listen on {host}:{port}: {text}", host=host, port=port, cause=text
    )
