"""Building the index of a video, inside the decoder process.

The bytes are examined (``integrity``), the stream is demuxed (``demuxing``), its frames are checked
by decoding some (``frame_check``), and their times and sizes are measured (``clock``,
``frame_sizes``).
"""

from __future__ import annotations

from dataclasses import replace

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import (
    FFmpegLog,
    decode_packet,
    drain_decoder,
    limit_exceeded,
    open_container,
    pixels_exceeded,
    read_packets,
    video_stream,
)
from prefill_service.video.decoder.demuxing import (
    Packets,
    demux_packets,
    missing_samples,
    too_many_frames,
)
from prefill_service.video.decoder.description import StreamDescription
from prefill_service.video.decoder.frame_check import Decoded, Frames, check_frames
from prefill_service.video.decoder.frame_sizes import (
    StoredSize,
    choose_geometry,
    stored_size,
    survey_sizes,
)
from prefill_service.video.decoder.integrity.damage import (
    describe_damage,
    describe_undecodable,
    says_damaged,
)
from prefill_service.video.decoder.integrity.examination import examine_file
from prefill_service.video.decoder.timing.clock import measure_clock
from prefill_service.video.decoder.timing.timestamps import OtherStreams
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason


def build_index(path: str, limits: VideoConfig, *, allow_truncated: bool = False) -> VideoIndex:
    """Index the video at ``path``; of a cut file what can be read, if that is allowed.

    Raises:
        ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, NO_VIDEO_STREAM, NO_FRAMES,
            TRUNCATED_VIDEO, VIDEO_LIMIT_EXCEEDED.
    """
    found = examine_file(path)
    flaw = found.flaw
    log: FFmpegLog = []
    try:
        with open_container(path, limits, log=log) as container:
            stream = video_stream(container, limits)
            if stream.frames > limits.max_frames:
                raise too_many_frames(stream.frames, limits)
            description = StreamDescription(container, stream)
            if says_damaged(container.format.name, log):
                container.seek(0, stream=stream)  # read it again, now to see where
            packets = demux_packets(container, stream, limits)
            flaw = found.add_flaw(
                cut=missing_samples(container, stream),
                lost=packets.describe_end(stream, container.size),
            )
    except ServiceError as error:
        if flaw and error.reason in (Reason.NOT_A_VIDEO, Reason.NO_VIDEO_STREAM):
            raise _truncated(f"{flaw}; nothing of it can be read") from None
        raise
    if flaw and not allow_truncated:
        raise _truncated(f"{flaw}; allow_truncated takes what can be read")
    if not packets.shown:
        raise ServiceError(Reason.NO_FRAMES, "the video stream holds no frames")
    frames = check_frames(path, limits, packets, description)
    index = _make_index(path, frames, packets, description, limits=limits)
    places = packets.places(found.damaged_bytes(description.stream_id))
    damage = describe_damage(
        [place for place in places if not flaw or place < packets.shown - 1], index.times_s
    )
    if frames.damaged > bool(flaw):  # the last packet of a cut file is said already
        damage = (*damage, describe_undecodable(frames.damaged, packets.shown))
    end = _describe_flaw(flaw, index) if flaw else found.describe_open_end(index)
    return replace(index, warnings=(*end, *damage, *index.warnings, *found.appended))


def _describe_flaw(flaw: str, index: VideoIndex) -> tuple[VideoWarning, ...]:
    message = (
        f"{flaw}. What can be read is used, {index.frame_count} frames up to second "
        f"{index.duration_s:.3f}; of the last ones a part may be missing"
    )
    return (VideoWarning(WarningReason.TRUNCATED, message),)


def _make_index(
    path: str,
    frames: Frames,
    packets: Packets,
    description: StreamDescription,
    *,
    limits: VideoConfig,
) -> VideoIndex:
    """The index of ``frames``, which are those of ``packets`` that can be decoded.

    Raises:
        ServiceError: VIDEO_LIMIT_EXCEEDED for its duration or the size of its frames.
    """
    others = OtherStreams(
        times_s=np.array(packets.other_s) - frames.stamps.start_s,
        packets=np.array(packets.other_at, np.int64),
    )
    clock = measure_clock(frames.stamps, description.declared, others, hidden=packets.hidden)
    if clock.duration_s > limits.max_duration_s:
        raise limit_exceeded(
            "max_duration_s",
            clock.duration_s,
            limits.max_duration_s,
            f"it lasts {clock.duration_s:.1f} s",
        )
    geometry, warnings = _measure_geometry(path, frames, limits)
    time_base = description.time_base
    return VideoIndex(
        container=description.container,
        codec=description.codec,
        geometry=geometry,
        time_base=(time_base.numerator, time_base.denominator),
        pts=frames.pts,
        keyframe=frames.keyframe,
        times_s=clock.times_s,
        fps=clock.fps,
        duration_s=clock.duration_s,
        warnings=(*clock.warnings, *warnings),
    )


def _measure_geometry(
    path: str, frames: Frames, limits: VideoConfig
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
    geometry, warnings = choose_geometry(sizes, frames.decoded.shown, limits.max_frame_pixels)
    return geometry, [*warnings, *_describe_fields(frames.decoded)]


def _describe_fields(decoded: Decoded) -> tuple[VideoWarning, ...]:
    """Say that frames have two fields of different times, if some of those looked at do."""
    if not decoded.interlaced:
        return ()
    message = (
        f"{decoded.interlaced} of the first {len(decoded.times)} frames are interlaced. They are "
        "not deinterlaced, as in vLLM: where something moves, both fields show. A file converted "
        "with ffmpeg's filter bwdif has none"
    )
    return (VideoWarning(WarningReason.INTERLACED, message),)


def _decode_keyframe(
    container: InputContainer, stream: VideoStream, pts: int, limits: VideoConfig
) -> VideoFrame | None:
    """The keyframe of a time, or one before it; none if it cannot be decoded."""
    try:
        container.seek(pts, stream=stream)
        for packet in read_packets(container, stream):
            if packet.size and packet.is_keyframe:
                frames = decode_packet(packet, limits) or drain_decoder(stream, limits)
                return next(iter(frames), None)
    except av.FFmpegError:  # the file is damaged there; a reader will say so
        pass
    return None


def _truncated(how: str) -> ServiceError:
    return ServiceError(Reason.TRUNCATED_VIDEO, how, detail=how)
