"""Which failures are worth another try, and when."""

from __future__ import annotations

import random
import time
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
        reconnect_s: a server that has answered this client before and cannot be reached, or is
            shutting down, is tried for this long, however many tries that takes: longer than a
            restart. One that never answered is given up after ``attempts``.
    """

    attempts: int = 5
    initial_delay_s: float = 0.2
    max_delay_s: float = 10.0
    reconnect_s: float = 180.0


@dataclass
class Contact:
    """Whether a client has had an answer of its server yet; all of its calls share one."""

    made: bool = False


class Backoff:
    """Counts the failures of one operation against a policy."""

    def __init__(self, policy: RetryPolicy, contact: Contact | None = None) -> None:
        self._policy = policy
        self._contact = contact or Contact()
        self._failures = 0
        self._lost_at: float | None = None  # since when the server cannot be reached
        self._server_error: PrefillError | None = (
            None  # the last error with a reason of the server's
        )

    def reset(self) -> None:
        """Forget the failures so far, because the operation got further."""
        self._contact.made = True
        self._failures = 0
        self._lost_at = None
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
        exhausted = self._failures >= policy.attempts and not self._waits_for_restart(error)
        if exhausted or asked > policy.max_delay_s:
            raise self._server_error or error
        longest = min(policy.max_delay_s, policy.initial_delay_s * 2.0 ** (self._failures - 1))
        return max(asked, longest * random.uniform(0.5, 1.0))

    def _waits_for_restart(self, error: PrefillError) -> bool:
        """Whether a server that was there before is away, and not for too long yet."""
        if error.reason not in _AWAY:
            self._lost_at = None
            return False
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
        waits = self._contact.made and self._policy.attempts > 1
        return waits and now < self._lost_at + self._policy.reconnect_s


def is_unavailable(error: PrefillError) -> bool:
    """Whether the same idempotent call may be made again."""
    return error.code is grpc.StatusCode.UNAVAILABLE


# Reasons of a server that restarts: gRPC's own without a connection, and its last words.
_AWAY = ("UNAVAILABLE", "SHUTTING_DOWN")

# A connection cut in the middle of a stream is usually UNAVAILABLE; proxies and resets also
# produce these, then without a reason of the server's own.
_BROKEN_STREAM = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "ABORTED", "CANCELLED")


def is_broken_stream(error: PrefillError) -> bool:
    """Whether an upload may go on from the committed size after this failure.

    An offset mismatch is among them: another process may be sending the same upload.
    """
    return is_unavailable(error) or error.reason in ("UPLOAD_OFFSET_MISMATCH", *_BROKEN_STREAM)
