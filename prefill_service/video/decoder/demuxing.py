"""The packets of a video stream, demuxed once without decoding, and where they cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from prefill_service.config import VideoConfig
from prefill_service.errors import ServiceError
from prefill_service.video.decoder.container import limit_exceeded
from prefill_service.video.decoder.description import WITHOUT_HEADER
from prefill_service.video.decoder.integrity.damage import DamageWatch
from prefill_service.video.decoder.timing.joins import LONG_GAP_S
from prefill_service.video.decoder.timing.timestamps import as_floats

_GAP_STEPS = 1.5  # frames are missing where a step is that many times the usual one


@dataclass(slots=True)
class Packets:
    """The video stream's packets, in the order of the file; times in its time base.

    Attributes:
        positions: their first bytes in the file; -1 if unknown.
        hidden: packets whose frames the container says not to show.
        other_s, other_at: seconds of the other streams' packets, and how many packets of the
            video precede each; only of formats without a header.
        tick_s: seconds per unit of its timestamps.
        damaged: how many of the video's packets precede each place that could not be read.
        unread_from: the byte from which on nothing could be read, if that is not the end.
    """

    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    keyframe: list[bool] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    tick_s: float = 0.0
    positions: list[int] = field(default_factory=list)
    hidden: int = 0
    other_s: list[float] = field(default_factory=list)
    other_at: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    unread_from: int | None = None

    @property
    def shown(self) -> int:
        """Number of packets whose frames are shown."""
        return len(self.pts)

    def places(self, damaged_bytes: Sequence[tuple[int, bool]]) -> list[int]:
        """How many packets precede each damaged byte, ascending; joins of recordings left out.

        Where MPEG-TS files were appended the packets' counters break too. It is a join if the
        clock is set back, jumps far (``joins`` says how it is told from a pause) or just goes on.

        Args:
            damaged_bytes: (position, whether another recording may begin there).
        """
        ascending = np.maximum.accumulate(np.array(self.positions, np.int64))
        steps = np.diff(as_floats(self.dts)) * self.tick_s
        known = steps[~np.isnan(steps)]
        usual = float(np.median(known)) if len(known) else 0.0
        found = set(self.damaged)
        for position, may_join in damaged_bytes:
            place = int(np.searchsorted(ascending, position))
            near = steps[max(0, place - 2) : place + 2]
            lost = ((near > _GAP_STEPS * usual) & (near < LONG_GAP_S)).any()
            if not may_join or lost:
                found.add(place)
        return sorted(found)

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


def demux_packets(container: InputContainer, stream: VideoStream, limits: VideoConfig) -> Packets:
    """Demux a stream to the end of its file, noting where that cannot be read.

    Raises:
        ServiceError: VIDEO_LIMIT_EXCEEDED for more packets than ``max_frames``.
    """
    packets = Packets(tick_s=float(stream.time_base or 0))
    hidden_vp8 = stream.codec_context.name == "vp8"
    everything = container.format.name in WITHOUT_HEADER
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
            packets.positions.append(-1 if packet.pos is None else packet.pos)
            if packets.shown > limits.max_frames:
                raise too_many_frames(packets.shown, limits)
    packets.damaged = watch.places
    packets.unread_from = watch.end if watch.gave_up else None
    return packets


def missing_samples(container: InputContainer, stream: VideoStream) -> str | None:
    """Frames that an MP4's sample table places behind the end of the file."""
    if not container.format.name.startswith("mov"):
        return None
    missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
    if not missing:
        return None
    return f"{missing} of its {len(stream.index_entries)} frames lie behind the end of the file"


def too_many_frames(count: int, limits: VideoConfig) -> ServiceError:
    """VIDEO_LIMIT_EXCEEDED for ``count`` frames, or more of them."""
    what = f"it holds {count} frames or more"
    return limit_exceeded("max_frames", count, limits.max_frames, what)
