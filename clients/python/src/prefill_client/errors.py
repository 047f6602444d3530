"""Exceptions: one class per family of the server's stable reasons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import grpc

from prefill_client._details import STATUS_DETAILS_KEY, ErrorDetails, decode_details


class PrefillError(Exception):
    """A call failed.

    Attributes:
        reason: stable and machine-readable, e.g. ``"NOT_A_VIDEO"``. The name of the gRPC code
            when the failure did not come from the service itself (a lost connection).
        message: one sentence for people.
        metadata: the variable parts of the message, e.g. ``{"tokens": "9000"}``.
        code: gRPC status; None when the error was not the status of a call (a failed job).
        request_id: id of the request, for the server's logs; empty if the call carries none.
        retry_after_s: when the server asked to be called again, in seconds from now.
    """

    reasons: ClassVar[frozenset[str]] = frozenset()
    codes: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        code: grpc.StatusCode | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"


class InvalidRequestError(PrefillError):
    """The request cannot be served as it is: an argument is missing or out of range."""

    reasons = frozenset(
        {
            "INVALID_REQUEST",
            "QUESTION_EMPTY",
            "QUESTION_TOO_LONG",
            "NO_ATTENTION_REPORT",
            "NO_TRACE",
        }
    )
    codes = frozenset({"INVALID_ARGUMENT", "OUT_OF_RANGE"})


class ArgumentError(InvalidRequestError, ValueError, TypeError):
    """An argument was refused by this client, before anything was sent.

    ``metadata`` has its ``name``, its ``value`` and what is ``accepted``.
    """


class ContextExceededError(PrefillError):
    """Video and question need more tokens than the model's or vLLM's context.

    The message and ``metadata`` say how many, the limit, and what would fit.
    """

    reasons = frozenset({"CONTEXT_EXCEEDED"})


class PermissionDeniedError(PrefillError):
    """The token is missing or wrong, or a path is outside the server's import roots."""

    reasons = frozenset({"UNAUTHENTICATED", "PATH_NOT_ALLOWED"})
    codes = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})


class NotFoundError(PrefillError):
    """There is no such video, job or prefix."""

    reasons = frozenset({"UNKNOWN_VIDEO", "UNKNOWN_JOB", "UNKNOWN_PREFIX"})
    codes = frozenset({"NOT_FOUND"})


class UploadError(PrefillError):
    """An upload went wrong, or is not finished."""

    reasons = frozenset(
        {
            "VIDEO_NOT_READY",
            "UPLOAD_OFFSET_MISMATCH",
            "UPLOAD_INCOMPLETE",
            "UPLOAD_SIZE_EXCEEDED",
            "UPLOAD_DIGEST_MISMATCH",
            "UPLOAD_STALLED",  # ours: the server takes no more bytes
            "FILE_CHANGED",  # ours: the file was written to during its upload
        }
    )


class InvalidVideoError(PrefillError):
    """The file was refused: not a video, damaged, or beyond the server's limits."""

    reasons = frozenset(
        {
            "NOT_A_VIDEO",
            "FORMAT_NOT_ALLOWED",
            "NO_VIDEO_STREAM",
            "NO_FRAMES",
            "TRUNCATED_VIDEO",
            "VIDEO_LIMIT_EXCEEDED",
            "DECODE_FAILED",
            "DECODE_TIMEOUT",
        }
    )


class CapacityError(PrefillError):
    """The server is full: disk, queue, KV memory or concurrent calls. Later may work."""

    reasons = frozenset({"STORAGE_FULL", "QUEUE_FULL", "KV_POOL_FULL"})
    codes = frozenset({"RESOURCE_EXHAUSTED"})


class CancelledError(PrefillError):
    """The call or the job was cancelled."""

    reasons = frozenset({"CANCELLED"})
    codes = frozenset({"CANCELLED"})


class DeadlineExceededError(PrefillError):
    """The call took longer than its timeout."""

    codes = frozenset({"DEADLINE_EXCEEDED"})


class UnavailableError(PrefillError):
    """The server, a rank or vLLM is away for the moment. Asking again may work."""

    reasons = frozenset(
        {
            "RANK_DIED",
            "VIDEO_DECODER_KILLED",
            "UPLOAD_IDLE",
            "RANK_STALLED",
            "LEASE_EXPIRED",
            "STALE_GENERATION",
            "HANDOFF_FAILED",
            "DECODER_UNAVAILABLE",
            "SHUTTING_DOWN",
            "STREAM_TRUNCATED",  # ours: the answer ended without its final message
        }
    )
    codes = frozenset({"UNAVAILABLE"})


class ServerError(PrefillError):
    """The server failed in a way that asking again is not known to help."""

    reasons = frozenset(
        {
            "PREFILL_FAILED",
            "MODEL_INVALID",
            "KV_CORRUPT",
            "KV_MISMATCH",
            "DECODER_FAILED",
            "CONFIG_INVALID",
            "PORT_IN_USE",
            "INTERNAL",
        }
    )
    codes = frozenset({"INTERNAL", "DATA_LOSS", "UNIMPLEMENTED"})


_FAMILIES: tuple[type[PrefillError], ...] = tuple(PrefillError.__subclasses__())
_BY_REASON = {reason: family for family in _FAMILIES for reason in family.reasons}
_BY_CODE = {code: family for family in _FAMILIES for code in family.codes}


def make_error(
    reason: str,
    message: str,
    *,
    metadata: Mapping[str, str] | None = None,
    code: grpc.StatusCode | None = None,
    request_id: str = "",
    retry_after_s: float | None = None,
) -> PrefillError:
    """Make the exception of a reason; ``PrefillError`` for one this release does not know."""
    family = _BY_REASON.get(reason, PrefillError)
    return family(
        reason,
        message,
        metadata=metadata,
        code=code,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def from_rpc_error(error: grpc.RpcError, request_id: str = "") -> PrefillError:
    """Make the exception of a failed call, sync or asyncio."""
    code = error.code() or grpc.StatusCode.UNKNOWN
    details = ErrorDetails()
    trailing: Any = error.trailing_metadata() or ()
    for key, value in trailing:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            details = decode_details(value)
    # Without ErrorInfo it is gRPC that speaks (no connection, deadline): go by the code.
    family = _BY_REASON.get(details.reason, PrefillError)
    if not details.reason:
        family = _BY_CODE.get(code.name, PrefillError)
    return family(
        details.reason or code.name,
        error.details() or code.name.replace("_", " ").lower(),
        metadata=details.metadata,
        code=code,
        request_id=details.request_id or details.metadata.get("request_id", "") or request_id,
        retry_after_s=details.retry_after_s,
    )
