"""Which failures are worth another try, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

import grpc

from prefill_client.errors import PrefillError


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter.

    Args:
        attempts: tries in all; 1 switches retrying off.
        initial_delay_s: longest wait before the second try; doubles with each failure.
        max_delay_s: the doubling stops here. A server that asks for a longer wait (RetryInfo)
            is not retried.
    """

    attempts: int = 5
    initial_delay_s: float = 0.2
    max_delay_s: float = 10.0


class Backoff:
    """Counts the failures of one operation against a policy."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0
        self._server_error: PrefillError | None = (
            None  # the last error with a reason of the server's
        )

    def reset(self) -> None:
        """Forget the failures so far, because the operation got further."""
        self._failures = 0
        self._server_error = None

    def delay(self, error: PrefillError) -> float:
        """Return the seconds to wait after ``error``, or raise it after enough tries.

        A stream that the server ends while we write may break without saying why (gRPC's
        "Internal error from Core"); then what the server said the time before is raised.
        """
        policy = self._policy
        self._failures += 1
        if error.reason not in _BROKEN_STREAM:
            self._server_error = error
        asked = error.retry_after_s or 0.0
        if self._failures >= policy.attempts or asked > policy.max_delay_s:
            raise self._server_error or error
        longest = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** (self._failures - 1))
        return max(asked, longest * random.uniform(0.5, 1.0))


def is_unavailable(error: PrefillError) -> bool:
    """Whether the same idempotent call may be made again."""
    return error.code is grpc.StatusCode.UNAVAILABLE


# A connection cut in the middle of a stream is usually UNAVAILABLE; proxies and resets also
# produce these, then without a reason of the server's own.
_BROKEN_STREAM = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED")


def is_broken_stream(error: PrefillError) -> bool:
    """Whether an upload may go on from the committed size after this failure.

    An offset mismatch is among them: another process may be sending the same upload.
    """
    return is_unavailable(error) or error.reason in ("UPLOAD_OFFSET_MISMATCH", *_BROKEN_STREAM)
