"""Reading ``grpc-status-details-bin``: the google.rpc error details of a failed call.

The google.rpc protos live in googleapis-common-protos, which the client does not depend on.
Their wire format is stable and tiny, so the messages needed are declared here, in a
descriptor pool of their own: they cannot collide with the real ones if those are installed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

STATUS_DETAILS_KEY = "grpc-status-details-bin"

_PACKAGE = "prefill_client.wire"
# message -> field -> (number, type, repeated). Map fields are entries on the wire, and an
# Any is a type URL and the bytes of a message.
_SCHEMA: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Any": {"type_url": (1, "string", False), "value": (2, "bytes", False)},
    "Status": {"details": (3, "Any", True)},
    "Entry": {"key": (1, "string", False), "value": (2, "string", False)},
    "ErrorInfo": {
        "reason": (1, "string", False),
        "domain": (2, "string", False),
        "metadata": (3, "Entry", True),
    },
    "Duration": {"seconds": (1, "int64", False), "nanos": (2, "int32", False)},
    "RetryInfo": {"retry_delay": (1, "Duration", False)},
    "RequestInfo": {"request_id": (1, "string", False)},
}


@dataclass(frozen=True)
class ErrorDetails:
    """The details of a status; empty where the server sent none."""

    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    request_id: str = ""


@functools.cache
def _message_classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="prefill_client/wire.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind, repeated) in fields.items():
            target = message.field.add(name=field_name, number=number)
            target.label = target.LABEL_REPEATED if repeated else target.LABEL_OPTIONAL
            if kind in _SCHEMA:
                target.type = target.TYPE_MESSAGE
                target.type_name = f".{_PACKAGE}.{kind}"
            else:
                target.type = target.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _SCHEMA
    }


def decode_details(status: bytes) -> ErrorDetails:
    """Decode a serialized google.rpc.Status. Anything malformed or unknown is left out."""
    classes = _message_classes()
    found: dict[str, Any] = {}
    try:
        for detail in classes["Status"].FromString(status).details:
            kind = detail.type_url.rpartition("google.rpc.")[2]
            if kind in ("ErrorInfo", "RetryInfo", "RequestInfo"):
                found.setdefault(kind, classes[kind].FromString(detail.value))
    except DecodeError:
        pass  # a proxy's or a foreign server's idea of details: the code and message remain
    info, retry, request = (found.get(k) for k in ("ErrorInfo", "RetryInfo", "RequestInfo"))
    delay = retry.retry_delay if retry is not None else None
    return ErrorDetails(
        reason=info.reason if info is not None else "",
        domain=info.domain if info is not None else "",
        metadata={entry.key: entry.value for entry in info.metadata} if info is not None else {},
        retry_after_s=None if delay is None else delay.seconds + delay.nanos / 1e9,
        request_id=request.request_id if request is not None else "",
    )
