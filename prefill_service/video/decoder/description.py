"""What a container says of its video stream."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from prefill_service.video.decoder.timing.timestamps import Declared, Stamps

WITHOUT_HEADER = ("mpegts", "mpeg")
"""Formats of packets only; FFmpeg then estimates a file's duration."""


class StreamDescription:
    """The container's own description of a stream, kept after it is closed.

    Attributes:
        container: FFmpeg's name of the format.
        codec: FFmpeg's name of the codec.
        stream_id: the container's number of the stream; in MPEG-TS its packets have it.
        time_base: seconds per unit of its timestamps.
        declared: rates, counts and durations.
    """

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self.container = container.format.name
        self.codec = stream.codec_context.name
        self.stream_id = stream.id
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


def _declared(container: InputContainer, stream: VideoStream) -> Declared:
    """What the container declares; FFmpeg estimates the durations of formats without a header."""
    has_header = container.format.name not in WITHOUT_HEADER
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
