"""Damage in the middle of a file: what its demuxer passed over, and where it found no way on.

FFmpeg passes over bytes that it cannot make sense of, and ends where nothing it knows follows.
Both look like a shorter video. Its log tells, or a flag of the packet, rarely an error. Of some
formats neither does, and their units are walked: here the boxes of a fragmented MP4, in
``structure`` the others.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO, Self

import av.logging
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from prefill_service.video.decoder.container import FFmpegLog, captured_log, read_packets
from prefill_service.video.decoder.integrity.structure import UNREAD
from prefill_service.video.index import VideoWarning, WarningReason

# Demuxers whose errors in the log mean damage, by the beginning of their names.
_TELLING = ("matroska", "ogg", "asf", "mxf", "mov", "flv")
# Packets to the file's end, no table behind them: what is left unread there cannot be read.
_SEQUENTIAL = ("mpeg", "flv", "ogg", "apng", "dv")
_ENDS_EARLY = ("ended prematurely", "Read error")  # a recording's end, which ``truncation`` judges
_LOST = ("edit unit sync lost", "Packet mismatch")  # MXF's and FLV's: no errors to FFmpeg
_NEAR = 16  # frames: packets are in another order
_WIDE = 1.5  # a gap is that many times the usual step
_LISTED = 5
_SEARCHED = 1 << 20
_FRAGMENT_HEAD = 12  # bytes from the name of a moof to that of its first box, both whole


def says_damaged(format_name: str, log: FFmpegLog) -> bool:
    """Whether the log of the demuxer ``format_name`` tells of bytes that it could not read."""
    return format_name.startswith(_TELLING) and any(
        name == format_name.split(" ")[0]
        and (level <= av.logging.ERROR or text.startswith(_LOST))
        and not any(words in text for words in _ENDS_EARLY)
        for level, name, text in log
    )


class DamageWatch:
    """Demuxes a file and notes where bytes of it could not be read.

    Attributes:
        places: how many of the video's packets precede each place, ascending.
        end: the byte behind the last packet that was read.
        gave_up: whether nothing that could be read followed the last place.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._container = container
        self._stream = stream
        self._capture = captured_log()
        self._log: FFmpegLog = []
        self._packets = 0
        self._failed = False
        # Of MPEG-TS few are flagged: ``transport_stream`` finds all.
        self._flags = container.format.name != "mpegts"
        self.places: list[int] = []
        self.end = 0
        self.gave_up = False

    def __enter__(self) -> Self:
        self._log = self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.__exit__(kind, error, trace)

    def demux(self, streams: list[Stream]) -> Iterator[Packet[Stream]]:
        """The packets of ``streams`` that have bytes, going on after errors.

        Raises:
            av.FFmpegError: the file cannot be read for another reason than its content.
        """
        packets = read_packets(self._container, *streams, on_error=self._fail)
        for packet in packets:
            if packet.size:
                self._note(packet)
                yield packet
        if self._failed or self._logged():
            self.gave_up = True
            self.places.append(self._packets)
        elif self.places and self._container.format.name in _SEQUENTIAL:
            size = self._container.size
            self.gave_up = size - self.end > size // UNREAD

    def _fail(self) -> None:
        self._failed = True

    def _note(self, packet: Packet[Stream]) -> None:
        ours = packet.stream_index == self._stream.index
        if self._logged() or self._failed or (ours and self._flags and packet.is_corrupt):
            self.places.append(self._packets)
        self._failed = False
        self._packets += ours
        if packet.pos is not None:
            self.end = max(self.end, packet.pos + packet.size)

    def _logged(self) -> bool:
        if not self._log:
            return False
        damaged = says_damaged(self._container.format.name, self._log)
        self._log.clear()
        return damaged


def describe_damage(places: list[int], times_s: np.ndarray) -> tuple[VideoWarning, ...]:
    """Say of what seconds frames are missing; nothing without ``places``.

    Args:
        places: how many packets precede each.
        times_s: [frames] float64, ascending.
    """
    if not places:
        return ()
    gaps = {}
    for place in places:
        first = min(max(0, place - _NEAR), len(times_s) - 1)
        near = times_s[first : place + _NEAR]
        if place >= len(times_s) - 1 or len(near) < 2:
            gaps[len(times_s)] = f"{times_s[-1]:.3f} to the end"
            continue
        steps = np.diff(near)
        widest = int(steps.argmax())
        if steps[widest] < _WIDE * np.median(steps):  # of a format that counts frames: no gap
            widest = max(0, min(place - first, len(steps)) - 1)
        gaps[first + widest] = f"{near[widest]:.3f} to {near[widest + 1]:.3f}"
    listed = ", ".join(gaps[frame] for frame in sorted(gaps)[:_LISTED])
    more = f" and {len(gaps) - _LISTED} more" if len(gaps) > _LISTED else ""
    message = (
        f"the file is damaged, and frames are missing there or wrong: about from second "
        f"{listed}{more}. The others are used"
    )
    return (VideoWarning(WarningReason.DAMAGED, message),)


def describe_undecodable(damaged: int, packets: int) -> VideoWarning:
    """Say how many packets, of ``packets`` in the file, were found to be damaged."""
    message = (
        f"the file is damaged: at least {damaged} of its {packets} packets cannot be decoded, "
        "and their frames are missing"
    )
    return VideoWarning(WarningReason.DAMAGED, message)


def find_lost_fragments(file: BinaryIO) -> str | None:
    """Say where the boxes of an MP4 end although fragments follow, or ``None``.

    Args:
        file: seekable; its position is not kept.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    if file.read(8)[4:] != b"ftyp":
        return None
    position = 0
    fragmented = False
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        if length == 0 and _is_name(kind):
            return None  # the box ends with the file
        if length < 8 or position + length > size or not _is_name(kind):
            break
        fragmented = fragmented or kind == b"moof"
        position += length
    if position + 8 > size:
        return None
    found = _find_fragment(file, position)
    if found is None:
        if fragmented and size - position > size // UNREAD:
            return f"the bytes from {position} to its end at {size} are none of its boxes"
        return None
    return f"bytes {position} to {found} are none of its boxes, and more fragments follow them"


def _find_fragment(file: BinaryIO, position: int) -> int | None:
    """Where a moof box begins at or behind ``position``."""
    file.seek(position)
    tail = b""
    while block := file.read(_SEARCHED):
        data = tail + block
        start = file.tell() - len(data)
        at = data.find(b"moof")
        while at >= 0:
            if data[at + 8 : at + 12] == b"mfhd":
                return start + at - 4
            at = data.find(b"moof", at + 1)
        tail = data[-_FRAGMENT_HEAD:]
    return None


def _is_name(kind: bytes) -> bool:
    return all(0x20 <= byte < 0x7F or byte == 0xA9 for byte in kind)
