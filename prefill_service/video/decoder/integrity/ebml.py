"""Matroska and WebM whose segment does not say how long it is: live and interrupted recordings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from prefill_service.video.decoder.integrity.units import (
    UNKNOWN,
    Unit,
    find_pattern,
    leaf,
    read_at,
)

EBML_MAGIC = b"\x1a\x45\xdf\xa3"
MKV_SEGMENT = b"\x18\x53\x80\x67"
_CLUSTER = b"\x1f\x43\xb6\x75"
_NEXT_CLUSTER = re.compile(re.escape(_CLUSTER))


def read_vint(file: BinaryIO) -> int:
    """An EBML data size; -1 if unknown or cut."""
    first = file.read(1)
    if not first or not first[0]:
        return -1
    width = 9 - first[0].bit_length()
    rest = file.read(width - 1)
    if len(rest) < width - 1:
        return -1
    value = int.from_bytes(bytes([first[0] & ((1 << (8 - width)) - 1)]) + rest, "big")
    return -1 if value == (1 << 7 * width) - 1 else value


def walk_matroska(file: BinaryIO, size: int) -> Iterator[Unit]:
    """The segment; of one of unknown size its elements and those of its clusters (RFC 8794)."""
    file.seek(len(EBML_MAGIC))
    length = max(read_vint(file), 0)
    segment = file.tell() + length
    yield leaf("EBML header", 0, segment)
    if read_at(file, segment, 4) != MKV_SEGMENT:
        yield leaf("rest", segment, size)
        return
    length = read_vint(file)
    position = file.tell()
    if length >= 0:
        # What follows is another file (``appended``), or junk; damage is in FFmpeg's log.
        yield Unit("segment", begin=segment, end=position + length, following=size)
        return
    yield Unit("segment", begin=segment, end=UNKNOWN, following=position)
    yield from _walk_elements(file, position, size)


def _walk_elements(file: BinaryIO, position: int, size: int) -> Iterator[Unit]:
    while position < size:
        unit = _read_element(file, position, size)
        if unit is None or unit.end > size:
            # A length that damage made too large is not the file's end if clusters follow.
            cluster = find_pattern(file, _NEXT_CLUSTER, position + 1)
            if cluster is None:
                if unit is not None:
                    yield unit
                return
            position = cluster
            continue
        yield unit
        position = unit.following


def _read_element(file: BinaryIO, position: int, size: int) -> Unit | None:
    """The element that begins at ``position``; a cluster's elements follow its head."""
    first = read_at(file, position, 1)[0]
    width = 9 - first.bit_length()
    if not 1 <= width <= 4:
        return None
    name = read_at(file, position, width)
    length = read_vint(file)
    content = file.tell()
    if len(name) < width or (length < 0 and content >= size):  # cut within its head
        return leaf("last element", position, size + 1)
    if name in (_CLUSTER, MKV_SEGMENT):
        end = UNKNOWN if length < 0 else content + length
        what = "last cluster" if name == _CLUSTER else "segment"
        return Unit(what, begin=position, end=end, following=content)
    if length < 0:
        return None
    return leaf("last element", position, content + length)
