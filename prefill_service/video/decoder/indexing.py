"""Building the index of a video, inside the decoder process.

The index has to name the frames a serial reader of the file sees. Demuxing alone is fast and
nearly always tells: one packet, one frame, its presentation time on it. It is wrong where a
decoder drops frames (a file cut in an open GOP), where packets and frames do not pair up
(field pictures, packed B-frames) or where timestamps are missing (B-frames in AVI). So the
head and the tail of the file are decoded and compared. Frames missing at either end are
taken off the index; anything else means the file is read serially, once here and again for
each use, by counting frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.appended import find_appended
from prefill_service.video.decoder.clock import measure_clock
from prefill_service.video.decoder.container import (
    FFmpegLog,
    decode_packet,
    drain_decoder,
    limit_exceeded,
    open_container,
    pixels_exceeded,
    video_stream,
)
from prefill_service.video.decoder.damage import (
    DamageWatch,
    describe_damage,
    describe_undecodable,
    find_lost_fragments,
    leave_out_joins,
    says_damaged,
)
from prefill_service.video.decoder.frame_sizes import (
    Shown,
    SizeRuns,
    StoredSize,
    choose_geometry,
    stored_size,
    survey_sizes,
)
from prefill_service.video.decoder.readers.pyav import decoded_frames
from prefill_service.video.decoder.seek_schedule import gop_starts
from prefill_service.video.decoder.timestamps import Declared, OtherStreams, Stamps
from prefill_service.video.decoder.truncation import find_truncation
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

_HEAD_FRAMES = 64
_MAX_REORDER = 64  # places a frame is shown away from where it is sent; codecs allow 16
_WITHOUT_HEADER = ("mpegts", "mpeg")  # packets only; FFmpeg then estimates a file's duration
_DRAWN_OVER = ("gif", "apng")  # each frame is drawn over the last, whatever its packet says
_TAIL_FRAMES = 600  # a longer last GOP is not checked: it would be decoded whole


@dataclass(slots=True)
class _Packets:
    """The video stream's packets, as demuxed without decoding; times in its time base.

    Attributes:
        hidden: packets whose frames the container says not to show.
        other_s, other_at: seconds of the other streams' packets, and how many packets of the
            video precede each; only of formats without a header.
        damaged: how many of the video's packets precede each place that could not be read.
        unread_from: the byte from which on nothing could be read, if that is not the end.
    """

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    keyframe: list[bool] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    hidden: int = 0
    other_s: list[float] = field(default_factory=list)
    other_at: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unread_from: int | None = None

    @property
    def shown(self) -> int:
        """Number of packets whose frames are shown."""
        return len(self.pts)

    def describe_end(self, stream: VideoStream, size: int) -> str | None:
        """Say where reading ended before the end of a file of ``size`` bytes, if it did."""
        if self.unread_from is None or self.unread_from >= size:
            return None
        known = [time for time in self.pts if time is not None]
        span_s = float((max(known) - known[0]) * (stream.time_base or 0)) if known else 0.0
        return (
            f"nothing can be read from byte {self.unread_from} of {size} on, about second "
            f"{span_s:.3f}"
        )


def build_index(path: str, limits: VideoConfig, *, allow_truncated: bool = False) -> VideoIndex:
    """Index the video at ``path``; of a cut file what can be read, if that is allowed.

    Raises:
        ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, NO_VIDEO_STREAM, NO_FRAMES,
            TRUNCATED_VIDEO, VIDEO_LIMIT_EXCEEDED.
    """
    with open(path, "rb") as file:
        flaw = _name_flaw("cut", find_truncation(file))
        flaw = flaw or _name_flaw("damaged", find_lost_fragments(file))
        appended = find_appended(file)
    log: FFmpegLog = []
    try:
        with open_container(path, limits, log=log) as container:
            stream = video_stream(container, limits)
            if stream.frames > limits.max_frames:
                raise _too_many_frames(stream.frames, limits)
            description = _Description(container, stream)
            if says_damaged(container.format.name, log):
                container.seek(0, stream=stream)  # read it again, now to see where
            packets = _demux(container, stream, limits)
            flaw = flaw or _name_flaw("cut", _missing_samples(container, stream))
            flaw = flaw or _name_flaw("damaged", packets.describe_end(stream, container.size))
    except ServiceError as error:
        if flaw and error.reason in (Reason.NOT_A_VIDEO, Reason.NO_VIDEO_STREAM):
            raise _truncated(f"{flaw}; nothing of it can be read") from None
        raise
    if flaw and not allow_truncated:
        raise _truncated(f"{flaw}; allow_truncated takes what can be read")
    if not packets.shown:
        raise ServiceError(Reason.NO_FRAMES, "the video stream holds no frames")
    frames = _check_frames(path, limits, packets, description)
    index = description.make_index(path, frames, packets, limits)
    places = [place for place in packets.damaged if not flaw or place < packets.shown - 1]
    damage = describe_damage(places, index.times_s)
    if frames.damaged > bool(flaw):  # the last packet of a cut file is said already
        damage = (*damage, describe_undecodable(frames.damaged, packets.shown))
    warnings = (*damage, *index.warnings, *appended)
    if flaw:
        message = (
            f"{flaw}. What can be read is used, {index.frame_count} frames "
            f"up to second {index.duration_s:.3f}; of the last ones a part may be missing"
        )
        warnings = (VideoWarning(WarningReason.TRUNCATED, message), *warnings)
    return replace(index, warnings=warnings)


def _name_flaw(kind: str, how: str | None) -> str | None:
    return f"the video file is {kind}: {how}" if how else None


def _demux(container: InputContainer, stream: VideoStream, limits: VideoConfig) -> _Packets:
    packets = _Packets()
    hidden_vp8 = stream.codec_context.name == "vp8"
    everything = container.format.name in _WITHOUT_HEADER
    with DamageWatch(container, stream) as watch:
        for packet in watch.demux(list(container.streams) if everything else [stream]):
            if packet.stream_index != stream.index:
                if packet.pts is not None and packet.time_base is not None:
                    packets.other_s.append(float(packet.pts * packet.time_base))
                    packets.other_at.append(packets.shown)
                continue
            if packet.is_discard:
                packets.hidden += 1
                continue
            if hidden_vp8 and not memoryview(packet)[0] >> 4 & 1:  # an alt-ref frame
                continue
            packets.pts.append(packet.pts)
            packets.dts.append(packet.dts)
            packets.keyframe.append(packet.is_keyframe)
            packets.duration.append(packet.duration or 0)
            if packets.shown > limits.max_frames:
                raise _too_many_frames(packets.shown, limits)
    packets.damaged = leave_out_joins(watch.places, packets.dts)
    packets.unread_from = watch.end if watch.gave_up else None
    return packets


def _missing_samples(container: InputContainer, stream: VideoStream) -> str | None:
    """Frames that an MP4's sample table places behind the end of the file."""
    if not container.format.name.startswith("mov"):
        return None
    missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
    if not missing:
        return None
    return f"{missing} of its {len(stream.index_entries)} frames lie behind the end of the file"


@dataclass(slots=True)
class _Decoded:
    """Frames that were decoded one after another.

    Attributes:
        times: their presentation times.
        sizes: their sizes.
        shown: how the container wants them shown; there is none without a frame.
        ended: whether the file ended.
        damaged: how many packets behind the first frame could not be decoded.
    """

    times: list[int | None] = field(default_factory=list)
    sizes: SizeRuns = field(default_factory=SizeRuns)
    shown: Shown | None = None
    ended: bool = True
    damaged: int = 0

    def note_damaged(self) -> None:
        """Count a packet; those before the first frame are of a GOP that was cut."""
        self.damaged += bool(self.times)


@dataclass(frozen=True, slots=True)
class _Frames:
    """The frames of a file.

    Attributes:
        decoded: what was decoded of them from the beginning.
        pts: [frames] int64, ascending; numbers from 0 if the file is read serially.
        keyframe: [frames] bool; all False if the file is read serially.
        stamps: their timestamps.
        damaged: how many packets of those decoded for the index could not be.
    """

    decoded: _Decoded
    pts: np.ndarray
    keyframe: np.ndarray
    stamps: Stamps
    damaged: int = 0


class _Description:
    """The container's own description of a stream, kept after it is closed."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container = container.format.name
        self.codec = stream.codec_context.name
        self.time_base = stream.time_base or Fraction(1, av.time_base)
        self.declared = _declared(container, stream)

    def stamps(self, times: np.ndarray, keyframe: np.ndarray, durations: np.ndarray) -> Stamps:
        """Timestamps [frames] (nan: none) and durations [frames] in ``time_base``, as seconds."""
        tick = float(self.time_base)
        known = times[~np.isnan(times)]
        start = float(known[0]) if len(known) else 0.0
        return Stamps(
            times_s=(times - start) * tick,
            keyframe=keyframe,
            durations_s=durations * tick,
            tick_s=tick,
            start_s=start * tick,
        )

    def make_index(
        self, path: str, frames: _Frames, packets: _Packets, limits: VideoConfig
    ) -> VideoIndex:
        """The index of ``frames``, which are those of ``packets`` that can be decoded.

        Raises:
            ServiceError: VIDEO_LIMIT_EXCEEDED for its duration or the size of its frames.
        """
        others = OtherStreams(
            times_s=np.array(packets.other_s) - frames.stamps.start_s,
            packets=np.array(packets.other_at, np.int64),
        )
        clock = measure_clock(frames.stamps, self.declared, others, hidden=packets.hidden)
        if clock.duration_s > limits.max_duration_s:
            raise limit_exceeded(
                "max_duration_s",
                clock.duration_s,
                limits.max_duration_s,
                f"it lasts {clock.duration_s:.1f} s",
            )
        geometry, warnings = _measure_geometry(path, frames, limits)
        return VideoIndex(
            container=self.container,
            codec=self.codec,
            geometry=geometry,
            time_base=(self.time_base.numerator, self.time_base.denominator),
            pts=frames.pts,
            keyframe=frames.keyframe,
            times_s=clock.times_s,
            fps=clock.fps,
            duration_s=clock.duration_s,
            warnings=(*clock.warnings, *warnings),
        )


def _declared(container: InputContainer, stream: VideoStream) -> Declared:
    """What the container declares; FFmpeg estimates the durations of formats without a header."""
    has_header = container.format.name not in _WITHOUT_HEADER
    durations = []
    if has_header:
        if stream.duration and stream.time_base:
            durations.append(float(stream.duration * stream.time_base))
        if container.duration:
            durations.append(container.duration / av.time_base)
    rates = (stream.average_rate, stream.guessed_rate)
    return Declared(
        rates=tuple(float(rate) for rate in rates if rate),
        frame_count=stream.frames,
        durations_s=tuple(durations),
        has_header=has_header,
        appendable=not has_header or container.format.name.startswith("matroska"),
    )


def _check_frames(
    path: str, limits: VideoConfig, packets: _Packets, description: _Description
) -> _Frames:
    """The frames that a serial reader sees, checked by decoding."""
    sent = _as_floats(packets.pts)
    order = np.argsort(sent, kind="stable")
    moved = np.abs(order - np.arange(len(order))).max(initial=0)
    trusted = (
        description.codec not in _DRAWN_OVER
        and not np.isnan(sent).any()
        and bool((np.diff(sent[order]) > 0).all())
        and moved <= _MAX_REORDER  # more: the clock was set back, as in joined recordings
        and not _set_back(_as_floats(packets.dts))  # the same, by less
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
                return _Frames(decoded, pts, keyframe, stamps, damaged)
        if not decoded.ended:
            decoded = _decode(path, limits, None, None)
    count = len(decoded.times)
    durations = np.zeros(count, np.int64)
    durations[-1] = packets.duration[-1]
    near_key = np.resize(np.array(packets.keyframe, bool), count)
    stamps = description.stamps(_serial_times(decoded.times, packets), near_key, durations)
    return _Frames(decoded, np.arange(count), np.zeros(count, bool), stamps, decoded.damaged)


def _measure_geometry(
    path: str, frames: _Frames, limits: VideoConfig
) -> tuple[Geometry, list[VideoWarning]]:
    """The geometry of the frames, and what is unusual about it."""
    keyframes = np.flatnonzero(frames.keyframe)
    with open_container(path, limits) as container:
        stream = video_stream(container, limits)

        def decode(number: int) -> tuple[int, StoredSize] | None:
            frame = _decode_keyframe(container, stream, int(frames.pts[number]), limits)
            if frame is None:
                return None
            if frame.pts is not None:
                number = int(np.searchsorted(frames.pts, frame.pts))
            return min(number, len(frames.pts) - 1), stored_size(stream, frame)

        sizes = survey_sizes(frames.decoded.sizes, len(frames.pts), keyframes, decode)
    largest = max(sizes, key=lambda size: size.width * size.height)
    if largest.width * largest.height > limits.max_frame_pixels:
        raise pixels_exceeded(largest.width, largest.height, limits)
    assert frames.decoded.shown is not None
    return choose_geometry(sizes, frames.decoded.shown, limits.max_frame_pixels)


def _decode_keyframe(
    container: InputContainer, stream: VideoStream, pts: int, limits: VideoConfig
) -> VideoFrame | None:
    """The keyframe of a time, or one before it; none if it cannot be decoded."""
    try:
        container.seek(pts, stream=stream)
        for packet in container.demux(stream):
            if packet.size and packet.is_keyframe:
                frames = decode_packet(packet, limits) or drain_decoder(stream, limits)
                return next(iter(frames), None)
    except av.FFmpegError:  # the file is damaged there; a reader will say so
        pass
    return None


def _decode(path: str, limits: VideoConfig, seek_pts: int | None, count: int | None) -> _Decoded:
    """Decode ``count`` frames (None: all)."""
    decoded = _Decoded()
    with open_container(path, limits) as container:
        stream = video_stream(container, limits)
        if seek_pts is not None:
            container.seek(seek_pts, stream=stream)
        for frame in decoded_frames(
            container.demux(stream), limits, on_damaged=decoded.note_damaged
        ):
            decoded.shown = decoded.shown or Shown.of_stream(stream, frame)
            decoded.times.append(frame.pts)
            decoded.sizes.append(stored_size(stream, frame))
            if len(decoded.times) > limits.max_frames:
                raise _too_many_frames(len(decoded.times), limits)
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


def _serial_times(times: list[int | None], packets: _Packets) -> np.ndarray:
    """[frames] float64 in the order of frames, nan where there is none.

    A decoder makes up times where the packets have none, and damaged files have wrong ones. If
    the times for decoding go back less often, they are better: there is one for every frame, and
    in order they are those of showing, a constant delay apart.
    """
    shown = _as_floats(times)
    decoded = _as_floats(packets.dts)
    if len(decoded) == len(shown) and not np.isnan(decoded).any():
        faults = _set_back(shown) + int(np.isnan(shown).sum())
        return decoded if _set_back(decoded) < faults else shown
    return shown


def _as_floats(times: list[int | None]) -> np.ndarray:
    return np.array([np.nan if time is None else time for time in times], np.float64)


def _set_back(times: np.ndarray) -> int:
    """How often a time is before the one before; missing ones do not count."""
    return int((np.diff(times[~np.isnan(times)]) < 0).sum())


def _too_many_frames(count: int, limits: VideoConfig) -> ServiceError:
    what = f"it holds {count} frames or more"
    return limit_exceeded("max_frames", count, limits.max_frames, what)


def _truncated(how: str) -> ServiceError:
    return ServiceError(Reason.TRUNCATED_VIDEO, how, detail=how)
