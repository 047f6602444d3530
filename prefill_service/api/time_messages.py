"""Times in the messages of ``prefill.v1``: seconds to protobuf's own types."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def duration_to_proto(seconds: float) -> Duration:
    """The duration, to the nanosecond."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def timestamp_to_proto(seconds: float) -> Timestamp | None:
    """The time, given in seconds since the epoch; ``None``, an unset field, for 0."""
    if not seconds:
        return None
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
