"""Numbers as people read them."""

from __future__ import annotations


def gibibytes(size: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def gigabytes(size: float) -> str:
    """Bytes in GB, or in MB below one: decimal, as links are rated."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Three figures of seconds, or of milliseconds below a tenth of one."""
    value, unit = (seconds * 1e3, "ms") if seconds < 0.1 else (seconds, "s")
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:#.3g}".rstrip(".") + f" {unit}"
