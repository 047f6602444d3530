"""Frames of a video through PyAV, by the seek schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import av
import numpy as np
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from typing_extensions import override

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import (
    decode_packet,
    open_container,
    read_packets,
    video_stream,
)
from prefill_service.video.decoder.readers.base import FrameReader
from prefill_service.video.decoder.seek_schedule import Seek, gop_starts, schedule_seeks
from prefill_service.video.geometry import Fit, Geometry
from prefill_service.video.index import VideoIndex

# A frame that does not come although decoding began so many GOPs before its own is damaged.
# Streams without real keyframes (intra refresh) need one or two to recover.
_LEAD_GOPS = 3

# Codecs whose decoders skip exactly the pictures that no other one is predicted from.
_SKIPPABLE = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
# Offsets, in bytes, in HEVC's configuration record (ISO/IEC 14496-15).
_HVCC_VERSION = 0
_HVCC_LAYERS = 21


def decoded_frames(
    packets: Iterable[Packet[VideoStream]],
    limits: VideoConfig,
    *,
    on_damaged: Callable[[], None] = lambda: None,
) -> Iterator[VideoFrame]:
    """Decode packets one by one; a damaged one gives no frame, and ``on_damaged`` is called."""
    for packet in packets:
        yield from decode_packet(packet, limits, on_damaged=on_damaged)


def to_rgb(frame: VideoFrame, geometry: Geometry) -> np.ndarray:
    """[height, width, 3] uint8 RGB as the geometry says, fitted in if its size is another."""
    fit = Fit.of(geometry, frame.width, frame.height)
    array = fit.paste(frame.to_ndarray(format="rgb24", width=fit.width, height=fit.height))
    if geometry.mirrored:
        array = array[::-1]
    return np.ascontiguousarray(np.rot90(array, geometry.rotation // 90))


def can_skip(context: VideoCodecContext) -> bool:
    """Whether frames that no other one refers to can be left out of this stream.

    HEVC only says of a picture that none of its own temporal layer refers to it. So there must
    be one layer, and the container must say so.
    """
    if context.name != "hevc":
        return context.name in _SKIPPABLE
    record = context.extradata or b""
    if len(record) <= _HVCC_LAYERS or record[_HVCC_VERSION] != 1:
        return False
    return record[_HVCC_LAYERS] >> 3 & 0b111 == 1


class PyAVReader(FrameReader):
    """Reads by presentation time: decodes only the GOPs that hold wanted frames.

    Of those GOPs it leaves out frames that are neither wanted nor referred to by any other
    (half of them, in x264's default streams): the wanted ones are the same to the last bit.
    """

    def __init__(self, path: str, index: VideoIndex, limits: VideoConfig, threads: int) -> None:
        self._path = path
        self._index = index
        self._limits = limits
        self._threads = threads
        self._starts = gop_starts(index.keyframe)
        self.decoded = 0
        self.seeks = 0
        self.unlisted = 0

    @override
    @classmethod
    def open(cls, path: str, index: VideoIndex, limits: VideoConfig, threads: int) -> Self:
        reader = cls(path, index, limits, threads)
        reader._open_file()
        return reader

    def _open_file(self) -> None:
        self._container = open_container(self._path, self._limits, self._threads)
        self._stream = video_stream(self._container, self._limits)
        self._stream.thread_type = "AUTO" if self._threads > 1 else "NONE"
        self._at_start = True

    @override
    def frames(self, targets: Sequence[int]) -> Iterator[np.ndarray]:
        if not self._index.keyframe_count:
            yield from self._read_serially(targets)
            return
        for seek in schedule_seeks(self._starts, targets):
            yield from self._read_after(seek)

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        geometry = self._index.geometry
        self.unlisted += not geometry.lists_size(frame.width, frame.height)
        return to_rgb(frame, geometry)

    def _read_serially(self, targets: Sequence[int]) -> Iterator[np.ndarray]:
        """Read by counting, a file whose timestamps do not name its frames."""
        wanted = iter(targets)
        target = next(wanted, None)
        for number, frame in enumerate(
            decoded_frames(read_packets(self._container, self._stream), self._limits)
        ):
            self.decoded += 1
            if number == target:
                yield self._to_rgb(frame)
                target = next(wanted, None)
            if target is None:
                return
        if target is not None:
            raise decode_failed(self._index, target)

    def _read_after(self, seek: Seek) -> Iterator[np.ndarray]:
        """Read a seek's targets, from an earlier GOP if its own proves not to be a start."""
        gop = seek.gop
        step = 1
        done = 0
        wanted = {int(pts) for pts in self._index.pts[list(seek.targets)]}
        skipping = can_skip(self._stream.codec_context)
        while True:
            landed_late = True
            for frame in self._decode_from(gop, wanted if skipping else None):
                if frame.pts is None:
                    continue
                target = seek.targets[done]
                due = self._index.pts[target]
                if frame.pts > due:
                    break
                landed_late = False
                if frame.pts == due:
                    yield self._to_rgb(frame)
                    done += 1
                    if done == len(seek.targets):
                        return
            # The frame did not come: the seek went past it (timestamps of some containers
            # are those of decoding), the stream recovers only slowly, it is damaged, or a
            # decoder that sees only some of the frames took it for one that comes too late.
            missing = seek.targets[done]
            own = int(np.searchsorted(self._starts, missing, side="right")) - 1
            if skipping:
                gop = max(gop, own)
                skipping = False
                continue
            if gop == 0 or (own - gop >= _LEAD_GOPS and not landed_late):
                raise decode_failed(self._index, missing)
            gop = max(0, gop - step)
            step *= 2

    def _decode_from(self, gop: int, wanted: set[int] | None) -> Iterator[VideoFrame]:
        """Decode from a GOP's keyframe (GOP 0: from the beginning) to the end of the file.

        Args:
            gop: where to begin.
            wanted: presentation times; other frames may be missing. None: all of them come.
        """
        if gop or not self._at_start:
            self.seeks += 1
        if gop == 0 and not self._at_start:
            self._container.close()
            self._open_file()
        self._at_start = False
        packets = read_packets(self._container, self._stream) if gop == 0 else self._seek(gop)
        for frame in decoded_frames(self._skipping(packets, wanted), self._limits):
            self.decoded += 1
            yield frame

    def _skipping(
        self, packets: Iterable[Packet[VideoStream]], wanted: set[int] | None
    ) -> Iterator[Packet[VideoStream]]:
        """The packets; before each, the decoder is set to decode its frame or to leave it out."""
        context = self._stream.codec_context
        for packet in packets:
            needed = wanted is None or packet.pts is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if needed else "NONREF"
            yield packet

    def _seek(self, gop: int) -> Iterator[Packet[VideoStream]]:
        """The packets from a GOP's keyframe, or an earlier one, on; none if that fails."""
        pts = int(self._index.pts[self._starts[gop]])
        try:
            self._container.seek(pts, stream=self._stream)
        except av.FFmpegError:
            return
        packets = read_packets(self._container, self._stream)
        for packet in packets:
            if packet.is_keyframe:
                # Behind the GOP's own keyframe, only its broken leading frames could match.
                if packet.pts is None or packet.pts <= pts:
                    yield packet
                    yield from packets
                return


def decode_failed(index: VideoIndex, target: int) -> ServiceError:
    """The error for a frame that is in the index and cannot be decoded."""
    time_s = float(index.times_s[target])
    return ServiceError(
        Reason.DECODE_FAILED,
        f"frame {target} at {time_s:.3f} s cannot be decoded; the file is damaged there",
        frame_index=target,
        time_s=f"{time_s:.3f}",
    )
