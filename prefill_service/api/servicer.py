"""What a servicer is, and the types that servicers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
"""A call, whose messages the stubs of grpc.aio leave generic."""


class Servicer(Protocol):
    """The handlers of one gRPC service."""

    @property
    def service_name(self) -> str:
        """Full name of the service, as in its proto."""
        ...

    def register_handlers(self, server: grpc.aio.Server) -> None:
        """Have ``server`` answer the service's calls with these handlers."""
        ...


@dataclass(frozen=True, slots=True)
class ServedService:
    """One service, and when it is ready.

    Attributes:
        servicer: its handlers.
        is_ready: whether calls can succeed now; asked four times a second, for the health service.
    """

    servicer: Servicer
    is_ready: Callable[[], bool] = lambda: True
