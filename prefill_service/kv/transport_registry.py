"""The transports there are, by the scheme of their endpoints."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from importlib import import_module

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv import transport
from prefill_service.kv.transport.base import Transport


def _find_transports() -> Iterator[Transport]:
    for module in pkgutil.iter_modules(transport.__path__, f"{transport.__name__}."):
        found: Transport | None = getattr(import_module(module.name), "TRANSPORT", None)
        if found is not None:
            yield found


TRANSPORTS: dict[str, Transport] = {found.scheme: found for found in _find_transports()}
"""One of each module in ``transport`` that defines ``TRANSPORT``."""


def find_transport(scheme: str) -> Transport:
    """The transport that a worker is configured to serve its pages with.

    Raises:
        ServiceError: CONFIG_INVALID, naming the transports there are.
    """
    if scheme not in TRANSPORTS:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"engine.kv_transport = {scheme!r} is not accepted; expected {_either(TRANSPORTS)}",
            name="engine.kv_transport",
        )
    return TRANSPORTS[scheme]


def transport_of(endpoint: str) -> Transport:
    """The transport of an endpoint in a manifest.

    Raises:
        ServiceError: HANDOFF_FAILED for an address of none of them.
    """
    scheme, colon, _ = endpoint.partition(":")
    if not colon or scheme not in TRANSPORTS:
        expected = _either([known.example for known in TRANSPORTS.values()])
        raise ServiceError(
            Reason.HANDOFF_FAILED,
            f"address {endpoint!r} is not supported; expected {expected}",
            address=endpoint,
        )
    return TRANSPORTS[scheme]


def _either(names: Iterable[str]) -> str:
    return " or ".join(names)
