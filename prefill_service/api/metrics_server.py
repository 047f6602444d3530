"""``/metrics`` for Prometheus, over HTTP.

On the event loop, so that what is read at a scrape needs no lock.
"""

from __future__ import annotations

import errno
import logging

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

from prefill_service.config import split_address
from prefill_service.errors import Reason, ServiceError

logger = logging.getLogger(__name__)


class MetricsServer:
    """Serves one registry.

    Args:
        address: ``host:port``; port 0 picks a free one.
        registry: what to serve.
    """

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        self._host, self._port = split_address(address)
        app = web.Application()
        app.router.add_get("/metrics", make_aiohttp_handler(registry))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self) -> int:
        """Begin to serve; returns the port.

        Raises:
            ServiceError: PORT_IN_USE; CONFIG_INVALID for an address that cannot be bound.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            taken = error.errno == errno.EADDRINUSE
            raise ServiceError(
                Reason.PORT_IN_USE if taken else Reason.CONFIG_INVALID,
                f"cannot serve metrics on {self._host}:{self._port}: {error.strerror or error}",
                host=self._host,
                port=self._port,
            ) from error
        port = int(self._runner.addresses[0][1])
        logger.info("metrics on http://%s:%d/metrics", self._host, port)
        return port

    async def stop(self) -> None:
        """Close the port and what is connected to it."""
        await self._runner.cleanup()
