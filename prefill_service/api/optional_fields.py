"""Fields of messages that a client may leave unset."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def optional_field(message: Message, name: str) -> Any:
    """The value of a field with presence (``optional`` in the proto); ``None`` if it is not set."""
    return getattr(message, name) if message.HasField(name) else None
