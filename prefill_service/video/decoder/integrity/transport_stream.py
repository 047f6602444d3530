"""MPEG-TS: packets that all have one size, a sync byte, and a counter for each stream.

FFmpeg passes over what has no sync byte in silence, and flags few of the packets whose counter
breaks (ISO/IEC 13818-1, 2.4.3.3). Here both are found, by arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from prefill_service.video.decoder.integrity.units import find_pattern, read_at

_SYNC = 0x47
_NEXT = re.compile(b"G")
_PACKETS = ((188, 0), (192, 4), (204, 0))  # bytes of a packet, and where its sync byte is
_CHECKED = 5  # sync bytes in a row
_BLOCK = 16_384  # packets
_PIDS = 8192
_NULL = 0x1FFF
_TABLES = (0, 17)  # the streams of the tables that a recording begins with: PAT, SDT
_BEGINNING = 8  # packets within which it does
_MAX_BREAKS = 10_000


@dataclass(slots=True)
class TransportStream:
    """What the packets of a transport stream show.

    Attributes:
        cut: how they show that the file is cut, if they do.
        gaps: (first byte, one past the last) of bytes that are no packets, ascending; the last
            may end with the file.
        breaks: for each stream's id, the packets (first byte) whose counter breaks or whose
            content is marked as wrong, ascending.
        joins: those of ``breaks`` that are where another recording may begin.
    """

    cut: str | None = None
    gaps: list[tuple[int, int]] = field(default_factory=list)
    breaks: dict[int, list[int]] = field(default_factory=dict)
    joins: set[int] = field(default_factory=set)


def survey_transport_stream(file: BinaryIO, size: int) -> TransportStream | None:
    """Look at all packets of a transport stream; ``None`` if the file is none.

    Args:
        file: seekable; its position is not kept.
        size: of the file, in bytes.
    """
    head = read_at(file, 0, _CHECKED * max(size for size, _ in _PACKETS))
    for packet, sync in _PACKETS:
        syncs = head[sync::packet]
        if len(syncs) >= _CHECKED and set(syncs[:_CHECKED]) == {_SYNC}:
            return _survey(file, size, packet, sync)
    return None


def _survey(file: BinaryIO, size: int, packet: int, sync: int) -> TransportStream:
    found = TransportStream()
    counters = np.full(_PIDS, -1, np.int64)
    position = 0
    count = 0
    while size - position >= packet:
        data = np.frombuffer(read_at(file, position, _BLOCK * packet), np.uint8)
        rows = data[: len(data) // packet * packet].reshape(-1, packet)[:, sync : sync + 6]
        lost = rows[:, 0] != _SYNC
        sound = int(lost.argmax()) if lost.any() else len(rows)
        for first, pid, joins in _find_breaks(rows[:sound].astype(np.int64), counters):
            found.breaks.setdefault(pid, []).append(position + first * packet)
            if joins:
                found.joins.add(position + first * packet)
            count += 1
        position += sound * packet
        if sound < len(rows):
            following = _resync(file, position + 1, (packet, sync), size)
            found.gaps.append((position, following))
            position = following
        if count + len(found.gaps) > _MAX_BREAKS:
            return found
    rest = size - position
    if rest > sync and read_at(file, position + sync, 1)[0] == _SYNC:  # else it is no packet
        found.cut = f"its last packet of {packet} bytes has {rest}"
    return found


def _resync(file: BinaryIO, position: int, form: tuple[int, int], size: int) -> int:
    """Where packets begin again at or behind ``position``; the end of the file if nowhere."""
    packet, sync = form

    def begins(at: int) -> bool:
        places = range(at, min(at + _CHECKED * packet, size), packet)
        return all(read_at(file, place, 1)[0] == _SYNC for place in places)

    at = find_pattern(file, _NEXT, position + sync, begins)
    return size if at is None else at - sync


def _find_breaks(rows: np.ndarray, counters: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """(row, stream, whether a recording may begin there) of counters that break.

    Args:
        rows: [packets, 6] int64, the first bytes of each.
        counters: [streams] int64, the last counter of each, -1 if there was none; moved on.
    """
    pids = (rows[:, 1] & 0x1F) << 8 | rows[:, 2]
    control = rows[:, 3] >> 4
    marked = (control & 2 > 0) & (rows[:, 4] > 0) & (rows[:, 5] & 0x80 > 0)
    counted = np.flatnonzero((control & 1 > 0) & (pids != _NULL))
    order = counted[np.argsort(pids[counted], kind="stable")]
    own = pids[order]
    values = rows[order, 3] & 15
    starts = np.diff(own, prepend=-1) != 0
    before = np.where(starts, counters[own], np.roll(values, 1))
    steps = (values - before) & 15
    broken = (before >= 0) & (steps > 1) & ~marked[order] | (rows[order, 1] & 0x80 > 0)
    counters[own] = values  # of equal indices the last one stays
    places = np.sort(order[broken])
    tables = places[np.isin(pids[places], _TABLES)]
    for row in places.tolist():
        begins = bool(((tables < row) & (tables >= row - _BEGINNING)).any())
        yield row, int(pids[row]), begins
