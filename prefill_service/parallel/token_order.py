"""How a chunk's tokens are given to the ranks."""

from __future__ import annotations

from enum import StrEnum


class Order(StrEnum):
    """Runs of a chunk that a rank gets: one, or two whose causal work adds up evenly."""

    DEALT = "dealt"
    ZIGZAG = "zigzag"
