"""The frames that a serial reader of a file sees, checked by decoding its head and tail.

Demuxing alone is fast and nearly always tells: one packet, one frame, its presentation time on
it. It is wrong where a decoder drops frames (a file cut in an open GOP), where packets and frames
do not pair up (field pictures, packed B-frames) or where timestamps are missing (B-frames in
AVI). So the head and the tail of the file are decoded and compared. Frames missing at either end
are taken off; anything else means the file is read serially, once here and again for each use, by
counting frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import open_container, read_packets, video_stream
from prefill_service.video.decoder.demuxing import Packets, too_many_frames
from prefill_service.video.decoder.description import StreamDescription
from prefill_service.video.decoder.frame_sizes import Shown, SizeRuns, stored_size
from prefill_service.video.decoder.readers.pyav import decoded_frames
from prefill_service.video.decoder.seek_schedule import gop_starts
from prefill_service.video.decoder.timing.timestamps import Stamps, as_floats

_HEAD_FRAMES = 64
_MAX_REORDER = 64  # places a frame is shown away from where it is sent; codecs allow 16
_DRAWN_OVER = ("gif", "apng")  # each frame is drawn over the last, whatever its packet says
_TAIL_FRAMES = 600  # a longer last GOP is not checked: it would be decoded whole


@dataclass(slots=True)
class Decoded:
    """Frames that were decoded one after another.

    Attributes:
        times: their presentation times.
        sizes: their sizes.
        shown: how the container wants them shown; there is none without a frame.
        ended: whether the file ended.
        interlaced: how many are.
        damaged: how many packets behind the first frame could not be decoded.
    """

    times: list[int | None] = field(default_factory=list)
    sizes: SizeRuns = field(default_factory=SizeRuns)
    shown: Shown | None = None
    ended: bool = True
    interlaced: int = 0
    damaged: int = 0

    def note_damaged(self) -> None:
        """Count a packet; those before the first frame are of a GOP that was cut."""
        self.damaged += bool(self.times)


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a file.

    Attributes:
        decoded: what was decoded of them from the beginning.
        pts: [frames] int64, ascending; numbers from 0 if the file is read serially.
        keyframe: [frames] bool; all False if the file is read serially.
        stamps: their timestamps.
        damaged: how many packets of those decoded for the index could not be.
    """

    decoded: Decoded
    pts: np.ndarray
    keyframe: np.ndarray
    stamps: Stamps
    damaged: int = 0


def check_frames(
    path: str, limits: VideoConfig, packets: Packets, description: StreamDescription
) -> Frames:
    """The frames that a serial reader sees, checked by decoding."""
    sent = as_floats(packets.pts)
    order = np.argsort(sent, kind="stable")
    moved = np.abs(order - np.arange(len(order))).max(initial=0)
    trusted = (
        description.codec not in _DRAWN_OVER
        and not np.isnan(sent).any()
        and bool((np.diff(sent[order]) > 0).all())
        and moved <= _MAX_REORDER  # more: the clock was set back, as in joined recordings
        and not _set_back(as_floats(packets.dts))  # the same, by less
    )
    pts = np.array([packets.pts[i] for i in order] if trusted else [], np.int64)
    keyframe = np.array(packets.keyframe, bool)[order]
    duration = np.array(packets.duration, np.int64)[order]
    decoded = _decode(path, limits, None, _HEAD_FRAMES if trusted else None)
    if not decoded.times:
        raise ServiceError(
            Reason.NO_FRAMES, f"none of the {packets.shown} frames in the file can be decoded"
        )
    if trusted:
        lead = _offset(pts, decoded.times)
        if lead is not None:
            pts = pts[lead:]
            keyframe = keyframe[lead:]
            duration = duration[lead:]
            decodable: np.ndarray | None = np.arange(len(pts)) < len(decoded.times)
            damaged = decoded.damaged
            if not decoded.ended:
                decodable, damaged = _decodable_tail(path, limits, pts, keyframe)
            if decodable is not None:
                pts = pts[decodable]
                keyframe = keyframe[decodable]
                stamps = description.stamps(pts.astype(np.float64), keyframe, duration[decodable])
                return Frames(decoded, pts, keyframe, stamps, damaged)
        if not decoded.ended:
            decoded = _decode(path, limits, None, None)
    count = len(decoded.times)
    durations = np.zeros(count, np.int64)
    durations[-1] = packets.duration[-1]
    near_key = np.resize(np.array(packets.keyframe, bool), count)
    stamps = description.stamps(_serial_times(decoded.times, packets), near_key, durations)
    return Frames(decoded, np.arange(count), np.zeros(count, bool), stamps, decoded.damaged)


def _decode(path: str, limits: VideoConfig, seek_pts: int | None, count: int | None) -> Decoded:
    """Decode ``count`` frames (None: all)."""
    decoded = Decoded()
    with open_container(path, limits) as container:
        stream = video_stream(container, limits)
        if seek_pts is not None:
            container.seek(seek_pts, stream=stream)
        for frame in decoded_frames(
            read_packets(container, stream), limits, on_damaged=decoded.note_damaged
        ):
            decoded.shown = decoded.shown or Shown.of_stream(stream, frame)
            decoded.times.append(frame.pts)
            decoded.interlaced += frame.interlaced_frame
            decoded.sizes.append(stored_size(stream, frame))
            if len(decoded.times) > limits.max_frames:
                raise too_many_frames(len(decoded.times), limits)
            if len(decoded.times) == count:
                decoded.ended = False
                break
    return decoded


def _decodable_tail(
    path: str, limits: VideoConfig, pts: np.ndarray, keyframe: np.ndarray
) -> tuple[np.ndarray | None, int]:
    """[frames] bool: False for frames of the last GOP that do not come out of the decoder.

    Also how many packets there cannot be decoded. ``None`` if frames come that are not in
    ``pts``.
    """
    start = int(gop_starts(keyframe)[-1])
    decodable = np.ones(len(pts), bool)
    if len(pts) - start > _TAIL_FRAMES:
        return decodable, 0
    tail_decoded = _decode(path, limits, int(pts[start]), None)
    times = tail_decoded.times
    tail = np.array([time for time in times if time is not None and time >= pts[start]], np.int64)
    if not len(tail):  # the seek went past the last keyframe; some containers do not seek well
        return decodable, 0
    if None in times or not np.isin(tail, pts).all() or (np.diff(tail) <= 0).any():
        return None, 0
    # Frames before the first that came may only need an earlier start.
    decodable[np.searchsorted(pts, tail[0]) :] = False
    decodable[np.searchsorted(pts, tail)] = True
    return decodable, tail_decoded.damaged


def _offset(pts: np.ndarray, times: list[int | None]) -> int | None:
    """Where ``times`` stands within ``pts``, gapless; ``None`` if it does not."""
    if None in times:
        return None
    found = np.array(times, np.int64)
    lead = int(np.searchsorted(pts, found[0]))
    return lead if np.array_equal(pts[lead : lead + len(found)], found) else None


def _serial_times(times: list[int | None], packets: Packets) -> np.ndarray:
    """[frames] float64 in the order of frames, nan where there is none.

    A decoder makes up times where the packets have none, and damaged files have wrong ones. If
    the times for decoding go back less often, they are better: there is one for every frame, and
    in order they are those of showing, a constant delay apart.
    """
    shown = as_floats(times)
    decoded = as_floats(packets.dts)
    if len(decoded) == len(shown) and not np.isnan(decoded).any():
        faults = _set_back(shown) + int(np.isnan(shown).sum())
        return decoded if _set_back(decoded) < faults else shown
    return shown


def _set_back(times: np.ndarray) -> int:
    """How often a time is before the one before; missing ones do not count."""
    return int((np.diff(times[~np.isnan(times)]) < 0).sum())
