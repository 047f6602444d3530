"""Formats whose units say their length in front: AVI, ASF, GIF, PNG and MXF."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

from prefill_service.video.decoder.integrity.units import (
    UNKNOWN,
    Unit,
    find_pattern,
    leaf,
    read_at,
)

# ---- AVI (RIFF, with the OpenDML extensions) -------------------------------------------------

_LISTS = (b"RIFF", b"LIST")
_LIST_HEAD = 12
_RIFF = "RIFF chunk"
_OPEN = (0, 0xFFFFFFFF)  # sizes of a list whose writer could not go back, or never came to it
_AVI_RESUME = re.compile(rb"\d\d(?:dc|db|wb|tx|sb)|ix\d\d|idx1|JUNK|RIFF|LIST")


def walk_avi(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Chunks of an AVI; those of a list follow its head, whatever its size says."""
    position: int | None = 0
    declared = 0  # where the last RIFF chunk ends, as it says; 0: unknown
    while position is not None and position + 8 <= size:
        unit = _read_chunk(file, position)
        whole = 0 < declared <= size
        # A length that damage made too large is not the file's end if that is declared.
        if unit is None or (unit.end > size and whole and unit.name != _RIFF):
            position = find_pattern(
                file, _AVI_RESUME, position + 1, lambda at: _is_chunk(file, at, size)
            )
            continue
        if unit.name == _RIFF:
            declared = max(unit.end, 0)
        yield unit
        position = unit.following
        if position < size and read_at(file, position, 1) == b"\0":
            position += 1  # the padding of a chunk of odd length
    if position is not None and position < size and declared == 0:
        yield leaf("last chunk", position, position + 8)


def _read_chunk(file: BinaryIO, position: int) -> Unit | None:
    head = read_at(file, position, 8)
    if len(head) < 8 or not all(0x20 <= byte < 0x7F for byte in head[:4]):
        return None
    name, length = struct.unpack("<4sI", head)
    end = position + 8 + length
    if name not in _LISTS:
        return leaf("last chunk", position, end)
    known = name == b"RIFF"
    end = UNKNOWN if known and length in _OPEN else end if known else position + _LIST_HEAD
    return Unit(
        name=_RIFF if known else "LIST chunk",
        begin=position,
        end=end,
        following=position + _LIST_HEAD,
    )


def _is_chunk(file: BinaryIO, position: int, size: int) -> bool:
    unit = _read_chunk(file, position)
    if unit is None or unit.end > size:
        return False
    end = unit.following
    return any(at >= size or _read_chunk(file, at) is not None for at in (end, end + 1))


# ---- ASF and WMV -----------------------------------------------------------------------------

_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_INDEXES = (
    bytes.fromhex("90080033b1e5cf1189f400a0c90349cb"),
    bytes.fromhex("d329e2d6da35d111903400a0c90349be"),
    bytes.fromhex("f803b1fead12644c840f2a1d2f7ad48c"),
)
_ASF_OBJECTS = (_ASF_HEADER, _ASF_DATA, *_ASF_INDEXES)
_ASF_DATA_HEAD = 50
_BROADCAST = 1
_MAX_HEADER = 1 << 20


def walk_asf(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Objects of an ASF file; of one that does not say how long it is, its last packet."""
    position = 0
    packet = 0
    broadcast = False
    while position < size:
        head = read_at(file, position, 24)
        if not any(known.startswith(head[:16]) for known in _ASF_OBJECTS):
            return
        if len(head) < 24:
            yield leaf("last object", position, position + 24)
            return
        length = int.from_bytes(head[16:], "little")
        if head[:16] == _ASF_HEADER:
            packet, broadcast = _asf_packets(read_at(file, position, min(length, _MAX_HEADER)))
        if head[:16] == _ASF_DATA and (broadcast or length <= _ASF_DATA_HEAD):
            yield Unit("data object", begin=position, end=UNKNOWN, following=size)
            rest = (size - position - _ASF_DATA_HEAD) % packet if packet else 0
            if rest:
                yield leaf("last packet", size - rest, size - rest + packet)
            return
        if length < 24:
            return
        name = "data object" if head[:16] == _ASF_DATA else "last object"
        yield leaf(name, position, position + length)
        position += length


def _asf_packets(header: bytes) -> tuple[int, bool]:
    """Bytes of a packet, 0 if they differ or are unknown, and whether the file was sent live."""
    at = header.find(_ASF_FILE)
    if at < 0 or len(header) < at + 100:
        return 0, False
    flags, least, most = struct.unpack_from("<III", header, at + 88)
    return (least if least == most else 0), bool(flags & _BROADCAST)


# ---- GIF -------------------------------------------------------------------------------------

_GIF_HEAD = 13
_GIF_IMAGE = 0x2C
_GIF_EXTENSION = 0x21
_GIF_TRAILER = 0x3B


def walk_gif(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Blocks of a GIF up to its trailer; behind something else nothing can be read."""
    head = read_at(file, 0, _GIF_HEAD)
    position = _GIF_HEAD + (_gif_colors(head[10]) if len(head) == _GIF_HEAD else 0)
    yield leaf("header", 0, position)
    while position < size:
        head = read_at(file, position, 10)
        if head[0] == _GIF_TRAILER:
            yield leaf("trailer", position, position + 1)
            return
        if head[0] == _GIF_EXTENSION:
            start = position + 2
        elif head[0] == _GIF_IMAGE:
            start = position + 11 + (_gif_colors(head[9]) if len(head) == 10 else 0)
        else:
            return
        end = _gif_blocks_end(file, start, size)
        yield leaf("last image" if head[0] == _GIF_IMAGE else "last extension", position, end)
        position = end


def _gif_colors(flags: int) -> int:
    """Bytes of the color table that follows."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_blocks_end(file: BinaryIO, position: int, size: int) -> int:
    """Where the sub-blocks that begin at ``position`` end."""
    while position < size:
        length = read_at(file, position, 1)[0]
        position += 1 + length
        if length == 0:
            return position
    return max(position, size) + 1


# ---- PNG -------------------------------------------------------------------------------------

_PNG_SIGNATURE = 8


def walk_png(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Chunks of a PNG up to IEND; behind something else nothing can be read."""
    position = _PNG_SIGNATURE
    yield leaf("signature", 0, position)
    while position < size:
        head = read_at(file, position, 8)
        if len(head) < 8:
            yield leaf("last chunk", position, position + 12)
            return
        length, name = struct.unpack(">I4s", head)
        if not name.isalpha():
            return
        end = position + 12 + length
        yield leaf("IEND chunk" if name == b"IEND" else "last chunk", position, end)
        if name == b"IEND":
            return
        position = end


# ---- MXF -------------------------------------------------------------------------------------

_MXF_KEY = b"\x06\x0e\x2b\x34"
_MXF_NEXT = re.compile(re.escape(_MXF_KEY) + rb"[\x01\x02]")
_MXF_PARTITION = bytes.fromhex("060e2b34020501010d010201")


def walk_mxf(file: BinaryIO, size: int) -> Iterator[Unit]:
    """Key, length and value triplets of an MXF file (SMPTE 377M)."""
    position: int | None = 0
    footer = 0  # where the last partition begins, as the first one says; 0: unknown
    while position is not None and position < size:
        unit = _read_klv(file, position)
        if unit is None or (unit.end > size and 0 < footer < size):
            position = find_pattern(
                file, _MXF_NEXT, position + 1, lambda at: _is_klv(file, at, size)
            )
            continue
        if position == 0 and read_at(file, 0, 12) == _MXF_PARTITION:
            value = read_at(file, _klv_head(read_at(file, 0, 25)), 32)
            footer = int.from_bytes(value[24:32], "big")
            if footer >= size:
                yield Unit("last partition", begin=0, end=footer + 1, following=0)
        yield unit
        position = unit.end


def _read_klv(file: BinaryIO, position: int) -> Unit | None:
    head = read_at(file, position, 25)
    if not head.startswith(_MXF_KEY[: len(head)]):
        return None
    start = position + _klv_head(head)
    if len(head) < 25 and start > position + len(head):  # cut within its key or length
        return leaf("last triplet", position, start)
    length = int.from_bytes(head[17 : start - position], "big") if head[16] & 0x80 else head[16]
    return leaf("last triplet", position, start + length)


def _klv_head(head: bytes) -> int:
    """Bytes of a triplet's key and length, of which ``head`` are the first."""
    return 17 + (head[16] & 0x7F if len(head) > 16 and head[16] & 0x80 else 0)


def _is_klv(file: BinaryIO, position: int, size: int) -> bool:
    unit = _read_klv(file, position)
    return unit is not None and (
        unit.end == size or (unit.end < size and _read_klv(file, unit.end) is not None)
    )
