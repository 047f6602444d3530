"""What offloading the keys and values of a prefix took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OffloadReport:
    """What a working set took.

    Attributes:
        high_water_bytes: most bytes that lay on the device at once.
        offloaded_bytes: bytes that are stored off the device at the end.
        moved_bytes: to and from there.
        stalled_s: seconds that computing waited for a layer.
    """

    high_water_bytes: int
    offloaded_bytes: int = 0
    moved_bytes: int = 0
    stalled_s: float = 0.0
