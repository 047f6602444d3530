"""Adaptive attention of one prefill on one rank, cut where selection units begin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import Range


@dataclass(frozen=True, slots=True)
class UnitAttention:
    """What an exchange computes with, and where each query's selection begins and ends.

    Attributes:
        adaptive: attends sparsely, and measures all attention of the prefill.
        units: of the prompt.
    """

    adaptive: AdaptiveAttention
    units: SelectionUnits

    def split(self, start: int, end: int) -> tuple[Range, list[Range]]:
        """Cut tokens [start, end) into those attended to exactly and the sparse units after."""
        return self.units.split(start, end, self.adaptive.is_sparse)

    def count_exact(self, layer: int, ranges: Iterable[Range]) -> None:
        """Count queries attended to exactly, of whose keys this rank holds only a part."""
        for start, end in ranges:
            self.adaptive.stats.count_exact(layer, start, end - start)
