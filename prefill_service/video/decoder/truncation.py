"""Whether a container says it is longer than the file.

FFmpeg reads what is left of a cut file without complaint, so the sizes that MP4, Matroska and
AVI declare of themselves are compared with the file's own.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_MP4_DATA_BOXES = (b"moov", b"moof", b"mdat")
EBML_MAGIC = b"\x1a\x45\xdf\xa3"
MKV_SEGMENT = b"\x18\x53\x80\x67"
_MAX_BOXES = 1_000_000


def find_truncation(file: BinaryIO) -> str | None:
    """Say how the container shows that the file is cut, or ``None`` if it does not.

    Args:
        file: seekable; its position is not kept.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp":
        return _mp4(file, size)
    if head[:4] == EBML_MAGIC:
        return _matroska(file, size)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        (declared,) = struct.unpack("<I", head[4:8])
        return _overrun("RIFF chunk", declared + 8, size)
    return None


def _overrun(what: str, end: int, size: int) -> str | None:
    return f"its {what} ends at byte {end}, the file at byte {size}" if end > size else None


def _mp4(file: BinaryIO, size: int) -> str | None:
    position = 0
    has_moov = False
    for _ in range(_MAX_BOXES):
        if position + 8 > size:
            break
        file.seek(position)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        end = size if length == 0 else position + length
        if kind in _MP4_DATA_BOXES and end > size:
            return _overrun(f"{kind.decode()} box", end, size)
        has_moov = has_moov or kind == b"moov"
        if end <= position:
            break
        position = end
    return None if has_moov else "it has no moov box (the part that a cut recording lacks)"


def _matroska(file: BinaryIO, size: int) -> str | None:
    file.seek(4)
    file.seek(max(read_vint(file), 0), os.SEEK_CUR)
    if file.read(4) != MKV_SEGMENT:
        return None
    length = read_vint(file)
    if length < 0:  # a live recording: unknown size
        return None
    return _overrun("segment", file.tell() + length, size)


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
