"""A unit of a file, and reading and searching for the next one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

UNKNOWN = -1
"""The end of a unit that does not say how long it is."""

_SEARCHED = 1 << 20


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a file that says how long it is.

    Attributes:
        name: for people.
        begin: its first byte.
        end: one past its last byte, as it says; it may lie behind the file's end.
        following: where the next unit is expected: within this one if it holds others.
    """

    name: str
    begin: int
    end: int
    following: int


def leaf(name: str, begin: int, end: int) -> Unit:
    """A unit that holds no others."""
    return Unit(name=name, begin=begin, end=end, following=end)


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """At most ``size`` bytes from ``position`` on."""
    file.seek(position)
    return file.read(size)


def find_pattern(
    file: BinaryIO,
    pattern: re.Pattern[bytes],
    position: int,
    accept: Callable[[int], bool] = lambda at: True,
) -> int | None:
    """Where ``pattern``, of at most 16 bytes, begins at or behind ``position``.

    Args:
        file: seekable.
        pattern: what begins a unit.
        position: where to begin.
        accept: whether a unit begins at a place where the pattern is.
    """
    while block := read_at(file, position, _SEARCHED):
        for match in pattern.finditer(block):
            if accept(position + match.start()):
                return position + match.start()
        if len(block) < _SEARCHED:
            return None
        position += _SEARCHED - 15  # a match at the border is found with the next block
    return None
