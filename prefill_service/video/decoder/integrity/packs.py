"""MPEG program streams (MPEG-PS, VOB) and raw DV: units of one stream, without a header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from prefill_service.video.decoder.integrity.units import Unit, find_pattern, leaf, read_at

_CODE = b"\0\0\1"
_END = 0xB9
_PACK = 0xBA
_FIRST_PACKET = 0xBB  # system header; all above have their length behind the code
# Those that a demuxer goes on with: packs, system headers, private, audio and video packets.
_RESUME = re.compile(rb"\x00\x00\x01[\xba\xbb\xbd\xc0-\xef]")
_DV_HEADER = b"\x1f\x07\0"
_DV_FRAMES = (120_000, 144_000, 240_000, 288_000, 480_000, 576_000)  # bytes, by profile


def walk_program_stream(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Pack headers and packets of an MPEG program stream (ISO/IEC 13818-1, 2.5.3)."""
    position: int | None = find_pattern(file, _RESUME, 0)
    while position is not None and position < size:
        unit = _read_pack(file, position, size)
        if unit is None or not (unit.end >= size or _begins(file, unit.end, size)):
            # What follows is no unit: that is damage behind this one, or it is none itself.
            if unit is not None:
                yield unit
            start = position + 1 if unit is None else unit.end
            position = find_pattern(file, _RESUME, start, lambda at: _is_sound(file, at, size))
            continue
        yield unit
        position = unit.end


def _begins(file: BinaryIO, position: int, size: int) -> bool:
    """Whether a unit begins at ``position``, or may have before the file was cut."""
    head = read_at(file, position, 4)
    if len(head) < 4:
        return _CODE.startswith(head[:3])
    return head[:3] == _CODE and head[3] >= _END


def _is_sound(file: BinaryIO, position: int, size: int) -> bool:
    unit = _read_pack(file, position, size)
    return unit is not None and (unit.end >= size or _begins(file, unit.end, size))


def _read_pack(file: BinaryIO, position: int, size: int) -> Unit | None:
    head = read_at(file, position, 14)
    if len(head) < 4 and _CODE.startswith(head[:3]):
        return leaf("last start code", position, position + 4)
    if head[:3] != _CODE or head[3] < _END:
        return None
    code = head[3]
    if code == _END:
        return leaf("end code", position, position + 4)
    if code == _PACK:
        mpeg2 = len(head) < 5 or head[4] >> 6 == 1
        stuffing = head[13] & 7 if mpeg2 and len(head) == 14 else 0
        return leaf("last pack header", position, position + (14 + stuffing if mpeg2 else 12))
    length = int.from_bytes(head[4:6], "big") if len(head) >= 6 else 2
    if length == 0:  # up to the next one
        found = find_pattern(file, _RESUME, position + 6)
        return leaf("last packet", position, size if found is None else found)
    return leaf("last packet", position, position + 6 + length)


def walk_dv(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Frames of raw DV, which all have one size (SMPTE 314M, IEC 61834)."""
    first = read_at(file, 0, 4)
    default = _DV_FRAMES[first[3] >> 7] if len(first) == 4 else _DV_FRAMES[0]
    found = (step for step in _DV_FRAMES if read_at(file, step, 3) == _DV_HEADER)
    step = next(found, default)
    for position in range(0, size, step):
        if read_at(file, position, 3) == _DV_HEADER[: size - position]:
            yield leaf("last frame", position, position + step)
