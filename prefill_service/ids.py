"""Ids of videos and jobs: a prefix, then time and chance in Crockford's base 32."""

from __future__ import annotations

import re
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # no i, l, o, u
_ID = re.compile(f"[a-z]+_[{_ALPHABET}]{{26}}")


def new_id(prefix: str) -> str:
    """``prefix_`` and 26 characters: 48 bits of time, so that ids sort by age, 80 of chance."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[number >> 5 * i & 31] for i in reversed(range(26)))


def is_id(prefix: str, text: str) -> bool:
    """Whether ``text`` can be an id with this prefix. Nothing else may become part of a path."""
    return text.startswith(f"{prefix}_") and _ID.fullmatch(text) is not None
