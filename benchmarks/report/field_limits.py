"""The blocks on limits of requests: the API's own table, as the documents show it."""

from __future__ import annotations

from benchmarks import tables
from prefill_service.api.limit_kinds import Items, Nested
from prefill_service.api.limits import LIMITS


def fields() -> str:
    """Every field of every request, what it may hold, and what else bounds it."""
    lines = []
    for message, limits in LIMITS.items():
        for name, limit in limits.items():
            inner = limit.element if isinstance(limit, Items) else limit
            note = inner.note or ("required" if inner.required else "")
            if not isinstance(limit, Nested):
                lines.append([f"`{message}.{name}`", str(limit), note])
    return tables.markdown(("field", "accepted", "beside that"), lines)
