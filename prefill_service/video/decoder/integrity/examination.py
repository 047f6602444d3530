"""What the bytes of a file show of its being whole, before FFmpeg reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from prefill_service.video.decoder.integrity.appended import find_appended
from prefill_service.video.decoder.integrity.damage import find_lost_fragments
from prefill_service.video.decoder.integrity.structure import (
    Structure,
    describe_rest,
    survey_structure,
)
from prefill_service.video.decoder.integrity.transport_stream import (
    TransportStream,
    survey_transport_stream,
)
from prefill_service.video.decoder.integrity.truncation import find_truncation
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

_BUFFER = 1 << 16  # bytes; units are mostly smaller


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found.

    Attributes:
        structure: how its units follow one another.
        flaw: a sentence about the part that is missing, if the file is cut or its rest is lost.
        appended: warnings of recordings that are not read.
        transport: of a transport stream, whose packets are counted.
    """

    structure: Structure
    flaw: str | None
    appended: tuple[VideoWarning, ...]
    transport: TransportStream | None

    def damaged_bytes(self, stream_id: int) -> list[tuple[int, bool]]:
        """Where bytes of a stream are missing or wrong, and whether it may be a join."""
        found = [(begin, False) for begin, _ in self.structure.gaps]
        if self.transport is not None:
            breaks = self.transport.breaks.get(stream_id, [])
            found += [(begin, begin in self.transport.joins) for begin in breaks]
        return sorted(found)

    def add_flaw(self, cut: str | None, lost: str | None) -> str | None:
        """The flaw, also of what was found in reading the file; how it is cut comes first."""
        return self.flaw or _name("cut", cut) or _name("damaged", lost or self.structure.lost)

    def describe_open_end(self, index: VideoIndex) -> tuple[VideoWarning, ...]:
        """Say that the file does not tell where it ends, if so."""
        if not self.structure.open_ended:
            return ()
        message = (
            "the file does not say where it ends, as live and interrupted recordings do not. It "
            f"ends with a whole unit and is taken for whole: {index.frame_count} frames up to "
            f"second {index.duration_s:.3f}"
        )
        return (VideoWarning(WarningReason.OPEN_ENDED, message),)


def examine_file(path: str) -> Examination:
    """Look at the units of a file, without decoding it."""
    with open(path, "rb", buffering=_BUFFER) as file:
        size = os.fstat(file.fileno()).st_size
        transport = survey_transport_stream(file, size)
        structure = survey_structure(file) if transport is None else _structure(transport, size)
        cut = structure.cut or find_truncation(file)
        return Examination(
            structure=structure,
            flaw=_name("cut", cut) or _name("damaged", find_lost_fragments(file)),
            appended=find_appended(file),
            transport=transport,
        )


def _structure(transport: TransportStream, size: int) -> Structure:
    gaps = transport.gaps
    lost = None
    if gaps and gaps[-1][1] == size:
        lost = describe_rest(gaps[-1][0], size)
        gaps = gaps[:-1]
    return Structure(cut=transport.cut, lost=lost, gaps=tuple(gaps))


def _name(kind: str, how: str | None) -> str | None:
    return f"the video file is {kind}: {how}" if how else None
