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

from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import (
    limit_exceeded,
    open_container,
    pixels_exceeded,
    video_stream,
)
from prefill_service.video.decoder.readers.pyav import decoded_frames
from prefill_service.video.decoder.seek_schedule import gop_starts
from prefill_service.video.decoder.truncation import find_truncation
from prefill_service.video.index import VideoIndex

_HEAD_FRAMES = 64
_MAX_REORDER = 64  # places a frame is shown away from where it is sent; codecs allow 16
_TAIL_FRAMES = 600  # a longer last GOP is not checked: it would be decoded whole


@dataclass(slots=True)
class _Packets:
    """The video stream's packets, as demuxed without decoding."""

    pts: list[int] = field(default_factory=list)
    keyframe: list[bool] = field(default_factory=list)
    count: int = 0
    without_pts: int = 0
    last_duration: int = 0


def build_index(path: str, limits: VideoConfig) -> VideoIndex:
    """Index the video at ``path``.

    Raises:
        ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, NO_VIDEO_STREAM, NO_FRAMES,
            TRUNCATED_VIDEO, VIDEO_LIMIT_EXCEEDED.
    """
    with open(path, "rb") as file:
        truncation = find_truncation(file)
    try:
        with open_container(path, limits) as container:
            stream = video_stream(container, limits)
            if stream.frames > limits.max_frames:
                raise _too_many_frames(stream.frames, limits)
            packets = _demux(container, stream, limits)
            truncation = truncation or _missing_samples(container, stream)
            description = _Description(container, stream)
    except ServiceError as error:
        if truncation and error.reason in (Reason.NOT_A_VIDEO, Reason.NO_VIDEO_STREAM):
            raise _truncated(truncation) from None
        raise
    if truncation:
        raise _truncated(truncation)
    if not packets.count:
        raise ServiceError(Reason.NO_FRAMES, "the video stream holds no frames")
    frames = _check_frames(path, limits, packets, description)
    return description.make_index(frames, packets.last_duration, limits)


def _demux(container: InputContainer, stream: VideoStream, limits: VideoConfig) -> _Packets:
    packets = _Packets()
    hidden_vp8 = stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if hidden_vp8 and not memoryview(packet)[0] >> 4 & 1:  # an alt-ref frame
                continue
            packets.count += 1
            if packets.count > limits.max_frames:
                raise _too_many_frames(packets.count, limits)
            if packet.pts is None:
                packets.without_pts += 1
                continue
            packets.pts.append(packet.pts)
            packets.keyframe.append(packet.is_keyframe)
            packets.last_duration = packet.duration or packets.last_duration
    except (av.error.InvalidDataError, av.error.EOFError):
        pass  # a serial reader stops here too; what was read counts
    return packets


def _missing_samples(container: InputContainer, stream: VideoStream) -> str | None:
    """Frames that an MP4's sample table places behind the end of the file."""
    if not container.format.name.startswith("mov"):
        return None
    missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
    if not missing:
        return None
    return f"{missing} of its {len(stream.index_entries)} frames lie behind the end of the file"


@dataclass(frozen=True, slots=True)
class _Frames:
    """The frames of a file.

    Attributes:
        first: decoded; it tells size and rotation.
        pts: [frames] int64, ascending.
        keyframe: [frames] bool.
    """

    first: VideoFrame
    pts: np.ndarray
    keyframe: np.ndarray


class _Description:
    """The container's own description of a stream, kept after it is closed."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container = container.format.name
        self.codec = stream.codec_context.name
        self.time_base = stream.time_base or Fraction(1, av.time_base)
        self.rate = float(stream.average_rate or 0)

    def make_index(self, frames: _Frames, last_duration: int, limits: VideoConfig) -> VideoIndex:
        """The index of ``frames``; ``last_duration`` is the last packet's, in ``time_base``.

        Raises:
            ServiceError: VIDEO_LIMIT_EXCEEDED for its duration or the size of its first frame.
        """
        first = frames.first
        pts = frames.pts
        span = int(pts[-1] - pts[0])
        # Without a duration on the last frame, it is shown as long as the average one.
        last = last_duration or (span / (len(pts) - 1) if len(pts) > 1 else 0)
        duration_s = float((span + last) * self.time_base)
        fps = self.rate if 0 < self.rate <= 1000 else len(pts) / duration_s if duration_s else 0.0
        duration_s = duration_s or (1 / fps if fps else 0.0)
        if duration_s > limits.max_duration_s:
            raise limit_exceeded(
                "max_duration_s", duration_s, limits.max_duration_s, f"it lasts {duration_s:.1f} s"
            )
        rotation = round(first.rotation / 90) * 90 % 360
        size = (first.width, first.height)
        if first.width * first.height > limits.max_frame_pixels:
            raise pixels_exceeded(first.width, first.height, limits)
        width, height = size if rotation in (0, 180) else size[::-1]
        return VideoIndex(
            container=self.container,
            codec=self.codec,
            width=width,
            height=height,
            rotation=rotation,
            time_base=(self.time_base.numerator, self.time_base.denominator),
            pts=pts,
            keyframe=frames.keyframe,
            fps=fps,
            duration_s=duration_s,
        )


def _check_frames(
    path: str, limits: VideoConfig, packets: _Packets, description: _Description
) -> _Frames:
    """The frames that a serial reader sees, checked by decoding."""
    order = np.argsort(np.array(packets.pts, np.int64), kind="stable")
    pts = np.array(packets.pts, np.int64)[order]
    keyframe = np.array(packets.keyframe, bool)[order]
    moved = np.abs(order - np.arange(len(order))).max(initial=0)
    trusted = (
        packets.without_pts == 0
        and bool((np.diff(pts) > 0).all())
        and moved <= _MAX_REORDER  # more: the clock was set back, as in joined recordings
    )
    first, head, ended = _decode(path, limits, None, _HEAD_FRAMES if trusted else None)
    if first is None:
        raise ServiceError(
            Reason.NO_FRAMES, f"none of the {packets.count} frames in the file can be decoded"
        )
    if trusted:
        lead = _offset(pts, head)
        if lead is not None:
            pts = pts[lead:]
            keyframe = keyframe[lead:]
            if ended:
                return _Frames(first, pts[: len(head)], keyframe[: len(head)])
            decodable = _decodable_tail(path, limits, pts, keyframe)
            if decodable is not None:
                return _Frames(first, pts[decodable], keyframe[decodable])
        if not ended:
            first, head, ended = _decode(path, limits, None, None)
            assert first is not None
    step = 1 / (description.rate * description.time_base) if description.rate else 1.0
    times = _ascending(head, float(step))
    return _Frames(first, times, np.zeros(len(times), bool))


def _decode(
    path: str, limits: VideoConfig, seek_pts: int | None, count: int | None
) -> tuple[VideoFrame | None, list[int | None], bool]:
    """Decode ``count`` frames (None: all): the first, all times, and whether the file ended."""
    times: list[int | None] = []
    first: VideoFrame | None = None
    with open_container(path, limits) as container:
        stream = video_stream(container, limits)
        if seek_pts is not None:
            container.seek(seek_pts, stream=stream)
        for frame in decoded_frames(container.demux(stream), limits):
            first = first or frame
            times.append(frame.pts)
            if len(times) > limits.max_frames:
                raise _too_many_frames(len(times), limits)
            if len(times) == count:
                return first, times, False
    return first, times, True


def _decodable_tail(
    path: str, limits: VideoConfig, pts: np.ndarray, keyframe: np.ndarray
) -> np.ndarray | None:
    """[frames] bool: False for frames of the last GOP that do not come out of the decoder.

    ``None`` if frames come that are not in ``pts``.
    """
    start = int(gop_starts(keyframe)[-1])
    decodable = np.ones(len(pts), bool)
    if len(pts) - start > _TAIL_FRAMES:
        return decodable
    _, times, _ = _decode(path, limits, int(pts[start]), None)
    tail = np.array([time for time in times if time is not None and time >= pts[start]], np.int64)
    if not len(tail):  # the seek went past the last keyframe; some containers do not seek well
        return decodable
    if None in times or not np.isin(tail, pts).all() or (np.diff(tail) <= 0).any():
        return None
    # Frames before the first that came may only need an earlier start.
    decodable[np.searchsorted(pts, tail[0]) :] = False
    decodable[np.searchsorted(pts, tail)] = True
    return decodable


def _offset(pts: np.ndarray, times: list[int | None]) -> int | None:
    """Where ``times`` stands within ``pts``, gapless; ``None`` if it does not."""
    if None in times:
        return None
    found = np.array(times, np.int64)
    lead = int(np.searchsorted(pts, found[0]))
    return lead if np.array_equal(pts[lead : lead + len(found)], found) else None


def _ascending(times: list[int | None], step: float) -> np.ndarray:
    """[frames] int64, ascending: the decoder's times if they are distinct, else even ones."""
    given = [time for time in times if time is not None]
    if len(set(given)) == len(times):
        return np.array(sorted(given), np.int64)
    return np.round(np.arange(len(times)) * max(step, 1.0)).astype(np.int64)


def _too_many_frames(count: int, limits: VideoConfig) -> ServiceError:
    what = f"it holds {count} frames or more"
    return limit_exceeded("max_frames", count, limits.max_frames, what)


def _truncated(how: str) -> ServiceError:
    return ServiceError(Reason.TRUNCATED_VIDEO, f"the video file is cut: {how}", detail=how)
