"""Checks of the arguments that callers of the store pass."""

from __future__ import annotations

import os
import re

from prefill_service.errors import Reason, ServiceError

MAX_NAME_CHARS = 255
SHA256 = re.compile("[0-9a-fA-F]{64}")


def invalid(name: str, value: object, accepted: str) -> ServiceError:
    """INVALID_REQUEST, naming the field, the value and what would be accepted."""
    return ServiceError(
        Reason.INVALID_REQUEST,
        f"{name} = {value!r} is not accepted; expected {accepted}",
        name=name,
        value=value,
        accepted=accepted,
    )


def check_name(display_name: str) -> None:
    """Raise INVALID_REQUEST for a name that is too long."""
    if len(display_name) > MAX_NAME_CHARS:
        raise invalid("display_name", display_name, f"at most {MAX_NAME_CHARS} characters")


def check_size(size_bytes: int, maximum: int) -> None:
    """Raise INVALID_REQUEST for no bytes, UPLOAD_SIZE_EXCEEDED for too many."""
    if size_bytes <= 0:
        raise invalid("size_bytes", size_bytes, "1 or more")
    if size_bytes > maximum:
        raise ServiceError(
            Reason.UPLOAD_SIZE_EXCEEDED,
            f"the file has {size_bytes} bytes; storage.max_upload_bytes is {maximum}",
            size_bytes=size_bytes,
            max_upload_bytes=maximum,
        )


def check_digest(sha256: str) -> None:
    """Raise INVALID_REQUEST unless it is a SHA-256 in hexadecimal."""
    if not SHA256.fullmatch(sha256):
        raise invalid("sha256", sha256, "64 hexadecimal digits")


def check_path(path: str) -> None:
    """Raise INVALID_REQUEST unless it is an absolute path."""
    if not os.path.isabs(path) or "\0" in path:
        raise invalid("path", path, "an absolute path")
