"""Files that were appended to a file of a format whose readers stop at the first one's end.

``cat a.mp4 b.mp4`` plays as ``a.mp4`` everywhere, without a word. FFmpeg reads a second Matroska
file, and no third. MPEG-TS and MPEG-PS (``joins``), and AVI, are read to the end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

from prefill_service.video.decoder.integrity.ebml import EBML_MAGIC, MKV_SEGMENT, read_vint
from prefill_service.video.index import VideoWarning, WarningReason

_MAX_PARTS = 2_000_000  # boxes or tags; a file of more is not looked at further


def find_appended(file: BinaryIO) -> tuple[VideoWarning, ...]:
    """A warning if some of the file's recordings are not read.

    Args:
        file: seekable; its position is not kept.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    starts: Callable[[BinaryIO], Iterator[int]]
    read = 1
    if head[4:8] == b"ftyp":
        starts = _mp4
    elif head[:4] == EBML_MAGIC:
        starts = _matroska
        read = 2
    elif head[:3] == b"FLV":
        starts = _flv
    else:
        return ()
    found = list(starts(file))
    if len(found) <= read:
        return ()
    message = (
        f"the file is {len(found)} files appended to one another, of a format that is not joined "
        f"so: what begins at byte {found[read]} of {size} is not part of the video"
    )
    return (VideoWarning(WarningReason.APPENDED, message),)


def _mp4(file: BinaryIO) -> Iterator[int]:
    position = 0
    for _ in range(_MAX_PARTS):
        file.seek(position)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        if kind == b"ftyp":
            yield position
        if length < 8:  # 0: up to the end of the file
            return
        position += length


def _matroska(file: BinaryIO) -> Iterator[int]:
    position = 0
    for _ in range(_MAX_PARTS):
        file.seek(position)
        if file.read(4) != EBML_MAGIC:
            return
        yield position
        file.seek(max(read_vint(file), 0), os.SEEK_CUR)
        if file.read(4) != MKV_SEGMENT or (length := read_vint(file)) < 0:
            return
        position = file.tell() + length


def _flv(file: BinaryIO) -> Iterator[int]:
    position = 0
    for _ in range(_MAX_PARTS):
        file.seek(position)
        head = file.read(11)
        if len(head) < 11:
            return
        if head[:3] == b"FLV":
            yield position
            (length,) = struct.unpack(">I", head[5:9])
            position += length + 4
            continue
        position += 11 + int.from_bytes(head[1:4], "big") + 4
