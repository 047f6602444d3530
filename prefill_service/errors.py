"""The one exception that crosses module, process and network borders.

Every error a user can cause or meet has a stable ``Reason``. The API layer turns a
``ServiceError`` into a gRPC status with ``google.rpc.ErrorInfo`` (AIP-193), the SDK turns
that back into an exception class. Nothing below the API layer knows of gRPC, so the
canonical status is kept here by name.
"""

from __future__ import annotations

from enum import StrEnum

ERROR_DOMAIN = "prefill-service"


class Reason(StrEnum):
    """Stable, machine-readable reasons (UPPER_SNAKE_CASE, at most 63 characters)."""

    # requests
    INVALID_REQUEST = "INVALID_REQUEST"
    QUESTION_EMPTY = "QUESTION_EMPTY"
    QUESTION_TOO_LONG = "QUESTION_TOO_LONG"
    CONTEXT_EXCEEDED = "CONTEXT_EXCEEDED"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    # videos
    UNKNOWN_VIDEO = "UNKNOWN_VIDEO"
    VIDEO_NOT_READY = "VIDEO_NOT_READY"
    UPLOAD_OFFSET_MISMATCH = "UPLOAD_OFFSET_MISMATCH"
    UPLOAD_INCOMPLETE = "UPLOAD_INCOMPLETE"
    UPLOAD_SIZE_EXCEEDED = "UPLOAD_SIZE_EXCEEDED"
    UPLOAD_IDLE = "UPLOAD_IDLE"
    UPLOAD_DIGEST_MISMATCH = "UPLOAD_DIGEST_MISMATCH"
    STORAGE_FULL = "STORAGE_FULL"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    NOT_A_VIDEO = "NOT_A_VIDEO"
    FORMAT_NOT_ALLOWED = "FORMAT_NOT_ALLOWED"
    NO_VIDEO_STREAM = "NO_VIDEO_STREAM"
    NO_FRAMES = "NO_FRAMES"
    TRUNCATED_VIDEO = "TRUNCATED_VIDEO"
    VIDEO_LIMIT_EXCEEDED = "VIDEO_LIMIT_EXCEEDED"
    DECODE_FAILED = "DECODE_FAILED"
    DECODE_TIMEOUT = "DECODE_TIMEOUT"
    VIDEO_DECODER_KILLED = "VIDEO_DECODER_KILLED"
    # jobs and workers
    UNKNOWN_JOB = "UNKNOWN_JOB"
    NO_ATTENTION_REPORT = "NO_ATTENTION_REPORT"
    NO_TRACE = "NO_TRACE"
    QUEUE_FULL = "QUEUE_FULL"
    CANCELLED = "CANCELLED"
    RANK_DIED = "RANK_DIED"
    RANK_STALLED = "RANK_STALLED"
    PREFILL_FAILED = "PREFILL_FAILED"
    KV_POOL_FULL = "KV_POOL_FULL"
    MODEL_INVALID = "MODEL_INVALID"
    # hand-off and vLLM
    UNKNOWN_PREFIX = "UNKNOWN_PREFIX"
    LEASE_EXPIRED = "LEASE_EXPIRED"
    STALE_GENERATION = "STALE_GENERATION"
    KV_CORRUPT = "KV_CORRUPT"
    KV_MISMATCH = "KV_MISMATCH"
    HANDOFF_FAILED = "HANDOFF_FAILED"
    DECODER_UNAVAILABLE = "DECODER_UNAVAILABLE"
    DECODER_FAILED = "DECODER_FAILED"
    # service
    CONFIG_INVALID = "CONFIG_INVALID"
    PORT_IN_USE = "PORT_IN_USE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


_STATUS: dict[Reason, str] = {
    Reason.UNAUTHENTICATED: "UNAUTHENTICATED",
    Reason.UNKNOWN_VIDEO: "NOT_FOUND",
    Reason.VIDEO_NOT_READY: "FAILED_PRECONDITION",
    Reason.UPLOAD_OFFSET_MISMATCH: "FAILED_PRECONDITION",
    Reason.UPLOAD_INCOMPLETE: "FAILED_PRECONDITION",
    Reason.UPLOAD_IDLE: "UNAVAILABLE",
    Reason.UPLOAD_DIGEST_MISMATCH: "DATA_LOSS",
    Reason.STORAGE_FULL: "RESOURCE_EXHAUSTED",
    Reason.PATH_NOT_ALLOWED: "PERMISSION_DENIED",
    Reason.DECODE_TIMEOUT: "DEADLINE_EXCEEDED",
    Reason.VIDEO_DECODER_KILLED: "UNAVAILABLE",
    Reason.UNKNOWN_JOB: "NOT_FOUND",
    Reason.NO_ATTENTION_REPORT: "FAILED_PRECONDITION",
    Reason.NO_TRACE: "FAILED_PRECONDITION",
    Reason.QUEUE_FULL: "RESOURCE_EXHAUSTED",
    Reason.CANCELLED: "CANCELLED",
    Reason.RANK_DIED: "UNAVAILABLE",
    Reason.RANK_STALLED: "UNAVAILABLE",
    Reason.PREFILL_FAILED: "INTERNAL",
    Reason.KV_POOL_FULL: "RESOURCE_EXHAUSTED",
    Reason.MODEL_INVALID: "FAILED_PRECONDITION",
    Reason.UNKNOWN_PREFIX: "NOT_FOUND",
    Reason.LEASE_EXPIRED: "UNAVAILABLE",
    Reason.STALE_GENERATION: "UNAVAILABLE",
    Reason.KV_CORRUPT: "DATA_LOSS",
    Reason.KV_MISMATCH: "INTERNAL",
    Reason.HANDOFF_FAILED: "UNAVAILABLE",
    Reason.DECODER_UNAVAILABLE: "UNAVAILABLE",
    Reason.DECODER_FAILED: "INTERNAL",
    Reason.SHUTTING_DOWN: "UNAVAILABLE",
    Reason.INTERNAL: "INTERNAL",
}
"""By reason, in the order above; whatever is not here is INVALID_ARGUMENT."""


class ServiceError(Exception):
    """An error with a stable reason.

    Args:
        reason: what went wrong, for programs.
        message: one sentence for people; names the offending value and the limit.
        **metadata: every variable part of the message again, for programs. Values are
            stored as strings.
    """

    def __init__(self, reason: Reason, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    @property
    def status(self) -> str:
        """Name of the canonical gRPC status code, e.g. ``"NOT_FOUND"``."""
        return _STATUS.get(self.reason, "INVALID_ARGUMENT")

    def to_dict(self) -> dict[str, object]:
        """JSON form, the inverse of ``from_dict``."""
        return {"reason": str(self.reason), "message": self.message, "metadata": self.metadata}

    @classmethod
    def from_dict(cls, data: dict[str, object]) -> ServiceError:
        """Rebuild an error that crossed a process border. An unknown reason becomes INTERNAL."""
        try:
            reason = Reason(str(data.get("reason")))
        except ValueError:
            reason = Reason.INTERNAL
        metadata = data.get("metadata")
        return cls(
            reason,
            str(data.get("message", "")),
            **(metadata if isinstance(metadata, dict) else {}),
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (ServiceError.from_dict, (self.to_dict(),))

    def __str__(self) -> str:
        return f"{self.message} [{self.reason}]"
