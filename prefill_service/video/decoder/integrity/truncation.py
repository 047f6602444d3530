"""Whether a file is cut: one rule for all containers.

A file is cut if it ends before a size that it declares of itself in bytes, or within a unit that
it began: a box, an element, a chunk, a packet, tag, block or page. FFmpeg reads what is left
without complaint. A file that ends between two units of a format without a header is not cut: so
does every live recording (MPEG-TS, fragments of MP4, clusters of unknown size). A declared
duration is no evidence, for many are wrong; ``clock`` compares it.

Here are MP4, FLV and Ogg, whose units are not all walked; ``structure`` and ``transport_stream``
have the others.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_MP4_DATA_BOXES = (b"moov", b"moof", b"mdat")
_MAX_BOXES = 1_000_000
_FLV_TAGS = (8, 9, 18)  # audio, video, script data
_OGG_PAGE = 27 + 255 + 255 * 255


def find_truncation(file: BinaryIO) -> str | None:
    """Say how the container shows that the file is cut, or ``None`` if it does not.

    Args:
        file: seekable; its position is not kept.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    if head[4:8] in _MP4_FIRST_BOXES:
        return _mp4(file, size)
    if head[:3] == b"FLV":
        return _flv(file, size)
    if head[:4] == b"OggS":
        return _ogg(file, size)
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


def _flv(file: BinaryIO, size: int) -> str | None:
    """Tags from the first to the last; each ends with its size in 4 bytes.

    What is no tag belongs to another file appended to this one, or is damage.
    """
    file.seek(5)
    (header,) = struct.unpack(">I", file.read(4).ljust(4, b"\0"))
    position = header + 4
    while position + 11 <= size:
        file.seek(position)
        head = file.read(4)
        if head[0] not in _FLV_TAGS:
            return None
        end = position + 11 + int.from_bytes(head[1:], "big")  # its size may be missing
        if end > size:
            return _overrun("last tag", end, size)
        position = end + 4
    return _overrun("last tag", position + 11, size) if position < size else None


def _ogg(file: BinaryIO, size: int) -> str | None:
    """The last page begins within the last two of the largest size."""
    start = max(0, size - 2 * _OGG_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return None
    head = tail[at : at + 27]
    table = tail[at + 27 : at + 27 + head[26]] if len(head) == 27 else b""
    whole = len(head) == 27 and len(table) == head[26]
    end = start + at + 27 + (len(table) + sum(table) if whole else _OGG_PAGE)
    return _overrun("last page", end, size)
