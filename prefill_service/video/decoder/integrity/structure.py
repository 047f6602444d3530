"""The units that a file is made of, one after another, and where they do not follow one another.

A format that is walked here (``walk_avi`` and the like) yields its units in the order of the file:
chunks, objects, packs, blocks. The rule for all of them: a unit that ends behind the file is cut;
bytes between two units are damage; bytes behind the last one are junk, unless they are many.
MPEG-TS is looked at in ``transport_stream``; MP4, FLV and Ogg in ``truncation``, and by FFmpeg's
log (``damage``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from prefill_service.video.decoder.integrity.chunks import (
    walk_asf,
    walk_avi,
    walk_gif,
    walk_mxf,
    walk_png,
)
from prefill_service.video.decoder.integrity.ebml import EBML_MAGIC, walk_matroska
from prefill_service.video.decoder.integrity.packs import walk_dv, walk_program_stream
from prefill_service.video.decoder.integrity.units import UNKNOWN, Unit, read_at

UNREAD = 20
"""A rest is one of at least this part of the file: the last packet of a file has overhead."""

_STUFFING = 32  # bytes: zeros between two units that are fewer are stuffing
_CD_SECTOR = 304  # bytes between the sectors' contents in a file of a Video CD
_MAX_GAPS = 10_000


@dataclass(frozen=True, slots=True)
class Structure:
    """What the units of a file show.

    Attributes:
        cut: how they show that the file is cut, if they do.
        lost: from where on there is none, if that is a rest and not junk.
        gaps: (first byte, one past the last) of bytes between two units, ascending.
        open_ended: whether the file does not say where it ends.
    """

    cut: str | None = None
    lost: str | None = None
    gaps: tuple[tuple[int, int], ...] = ()
    open_ended: bool = False


@dataclass(frozen=True, slots=True)
class _Format:
    """How a format is recognised and walked.

    Attributes:
        magic: (offset, bytes) that its files have.
        walk: yields its units.
        trailer: name of the unit that ends it, if the format has one.
        allowed: bytes that may be between two units.
    """

    magic: tuple[tuple[int, bytes], ...]
    walk: Callable[[BinaryIO, int], Iterator[Unit]]
    trailer: str = ""
    allowed: int = 1


_FORMATS = (
    _Format(((0, b"RIFF"), (8, b"AVI ")), walk_avi),
    _Format(((0, b"RIFF"), (8, b"CDXA")), walk_program_stream, allowed=_CD_SECTOR),
    _Format(((0, b"\0\0\1\xba"),), walk_program_stream),
    _Format(((0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),), walk_asf),
    _Format(((0, b"GIF8"),), walk_gif, trailer="trailer"),
    _Format(((0, b"\x89PNG\r\n\x1a\n"),), walk_png, trailer="IEND chunk"),
    _Format(((0, b"\x06\x0e\x2b\x34"),), walk_mxf),
    _Format(((0, b"\x1f\x07\0"),), walk_dv),
    _Format(((0, EBML_MAGIC),), walk_matroska),
)


def survey_structure(file: BinaryIO) -> Structure:
    """Walk the units of a file; nothing is found in one of a format that is not walked.

    Args:
        file: seekable and buffered; its position is not kept.
    """
    size = os.fstat(file.fileno()).st_size
    head = read_at(file, 0, 12)
    for known in _FORMATS:
        if all(head[at:].startswith(magic) for at, magic in known.magic):
            return _judge(file, known.walk(file, size), size, known)
    return Structure()


def describe_rest(begin: int, size: int) -> str | None:
    """Say that a file of ``size`` bytes has no unit from ``begin`` on, unless that is junk."""
    if size - begin <= size // UNREAD:
        return None
    return f"nothing can be read from byte {begin} of {size} on"


def _judge(file: BinaryIO, units: Iterable[Unit], size: int, known: _Format) -> Structure:
    expected = 0
    name = ""
    cut = None
    open_ended = False
    gaps: list[tuple[int, int]] = []
    for unit in units:
        if unit.begin - expected > known.allowed and not _is_stuffing(file, expected, unit.begin):
            gaps.append((expected, unit.begin))
        open_ended = open_ended or unit.end == UNKNOWN
        if unit.end > size and cut is None:
            cut = f"its {unit.name} ends at byte {unit.end}, the file at byte {size}"
        expected = unit.following
        name = unit.name
        if len(gaps) >= _MAX_GAPS:
            break
    open_ended = open_ended or (bool(known.trailer) and name != known.trailer)
    lost = None
    if cut is None and len(gaps) < _MAX_GAPS:
        lost = describe_rest(expected, size)
    return Structure(cut=cut, lost=lost, gaps=tuple(gaps), open_ended=open_ended and not cut)


def _is_stuffing(file: BinaryIO, begin: int, end: int) -> bool:
    return end - begin < _STUFFING and not any(read_at(file, begin, end - begin))
