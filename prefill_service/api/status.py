"""``ServiceError`` as a gRPC status with AIP-193 details."""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from prefill_service.api.servicer import Context
from prefill_service.errors import ERROR_DOMAIN, Reason, ServiceError

_RETRY_S = {
    Reason.QUEUE_FULL: 5,
    Reason.KV_POOL_FULL: 5,
    Reason.STORAGE_FULL: 60,
    Reason.DECODER_UNAVAILABLE: 5,
    Reason.RANK_DIED: 5,
    Reason.UPLOAD_IDLE: 1,
    Reason.VIDEO_DECODER_KILLED: 1,
    Reason.RANK_STALLED: 5,
    Reason.SHUTTING_DOWN: 5,
}
_MESSAGE_BYTES = 1024
_METADATA_BYTES = 256
"""Clients accept 8 KiB of trailers; a client's own long input may be quoted in an error."""


def to_status(error: ServiceError, request_id: str = "") -> status_pb2.Status:
    """The error as ``google.rpc.Status``.

    Details: ErrorInfo always; RetryInfo for RESOURCE_EXHAUSTED and UNAVAILABLE; RequestInfo
    if the request had an id.
    """
    code = grpc.StatusCode[error.status]
    info = error_details_pb2.ErrorInfo(
        reason=error.reason,
        domain=ERROR_DOMAIN,
        metadata={key: _cut(value, _METADATA_BYTES) for key, value in error.metadata.items()},
    )
    details: list[AnyMessage] = [_pack(info)]
    if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(_RETRY_S.get(error.reason, 1))
        details.append(_pack(retry))
    if request_id:
        details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    return status_pb2.Status(
        code=code.value[0], message=_cut(error.message, _MESSAGE_BYTES), details=details
    )


async def abort(context: Context, error: ServiceError, request_id: str = "") -> NoReturn:
    """End a call with this error."""
    status = to_status(error, request_id)
    await context.abort(
        grpc.StatusCode[error.status],
        status.message,
        (("grpc-status-details-bin", status.SerializeToString()),),
    )
    raise AssertionError("abort returned")  # for the type checker: it raises


def _pack(message: object) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed


def _cut(text: str, limit: int) -> str:
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode(errors="ignore") + "..."
