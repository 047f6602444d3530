"""How often ranks agree inside a chunk that it goes on: by the clock, though they count layers.

An agreement makes every rank wait for the slowest. Once per layer, that is the sum of the slowest
ranks' times of all layers; ranks that may drift apart for a while even that out.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

EVERY_MS = 250
"""Between two agreements: what a cancelled job goes on for, at most, and some layer more."""


@dataclass(slots=True)
class SyncInterval:
    """One rank's view; all ranks count the same layers, and are told the same times.

    Attributes:
        every: layers between two agreements.
    """

    every: int = 1
    _layers: int = 0
    _start: float = field(default_factory=time.perf_counter)

    def due(self) -> bool:
        """Count a layer; whether an agreement is due before it."""
        self._layers += 1
        return self._layers >= self.every

    @property
    def layer_ms(self) -> int:
        """What a layer takes here, since the last agreement, rounded up; 0 before any."""
        elapsed = 1000 * (time.perf_counter() - self._start)
        return math.ceil(elapsed / self._layers) if self._layers else 0

    def agreed(self, layer_ms: int) -> None:
        """Go on from an agreement that found that a layer takes so long on the slowest rank."""
        if layer_ms:
            self.every = max(1, EVERY_MS // layer_ms)
        self._layers, self._start = 0, time.perf_counter()
