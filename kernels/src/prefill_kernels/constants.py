"""Numbers that the kernels, their references and the CPU back end share; no Triton here."""

from __future__ import annotations

import math

LEVELS = 256
"""Thresholds that selection tries; the last one is 0."""

LEVELS_PER_OCTAVE = 16
"""Threshold ``level`` is ``2**(-level / 16)`` times the largest loss of the tile."""

ROW_STEP = 4
"""Every fourth query of a tile is asked for the mean loss: neighbours want the same blocks."""


def largest_of_normals(count: int) -> float:
    """Location of the largest of ``count`` standard normal values (Fisher & Tippett, 1928)."""
    leading = math.sqrt(2 * math.log(count))
    return leading - (math.log(math.log(count)) + math.log(4 * math.pi)) / (2 * leading)
