"""Opening an untrusted file with FFmpeg, behind whitelists."""

from __future__ import annotations

import logging
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import av
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError

# Demuxers that read one self-contained file. Left out on purpose: everything that names
# other files (hls, dash, concat, sdp, image2, ...). FFmpeg hands both lists on to whatever a
# demuxer opens itself.
FORMATS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts",
           "mpeg", "flv", "asf", "ogg", "gif", "apng", "dv", "mxf")  # fmt: skip
PROTOCOLS = ("file",)
DECODERS = ("h264", "hevc", "vvc", "libdav1d", "vp8", "vp9", "mpeg4", "mpeg2video",
            "mpeg1video", "msmpeg4", "msmpeg4v2", "h263", "flv", "vc1", "wmv3", "wmv2", "wmv1",
            "theora", "mjpeg", "prores", "dnxhd", "ffv1", "rawvideo", "huffyuv",
            "ffvhuff", "gif", "apng", "dvvideo", "qtrle")  # fmt: skip

_Stream = TypeVar("_Stream", bound=Stream)
_MAX_FAILURES = 64  # errors in a row after which a demuxer is taken to find no way on
# FFmpeg's of a damaged packet; older decoders return -1 for it, which is EPERM.
_DAMAGED = (av.error.InvalidDataError, av.error.PermissionError)
_EXPLAINED = {
    "webp_pipe": "WebP is not accepted, FFmpeg reads no animated one: convert it to APNG or MP4",
}
_REFUSED_SIZE = re.compile(r"Picture size (\d+)x(\d+) ")
_PIXELS_LOG = "exceeds specified max pixel count"
_FRAME_BYTES_PER_PIXEL = 8  # a decoded frame and a decoder's tables, amply


FFmpegLog = list[tuple[int, str, str]]  # level, name of the part of FFmpeg, text


def silence_ffmpeg() -> None:
    """Keep FFmpeg's messages off stderr; ``open_container`` captures those it needs."""
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    logger = logging.getLogger("libav")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False


@contextmanager
def captured_log() -> Iterator[FFmpegLog]:
    """FFmpeg's errors and warnings, each one, as they come."""
    level = av.logging.get_level()
    skip_repeated = av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as log:
            yield log
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip_repeated)


def open_container(
    path: str,
    limits: VideoConfig,
    threads: int = 1,
    *,
    log: FFmpegLog | None = None,
) -> InputContainer:
    """Open a video file.

    Args:
        path: the file.
        limits: what must be refused.
        threads: decoding threads.
        log: where FFmpeg's messages are appended.

    Raises:
        ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, VIDEO_LIMIT_EXCEEDED.
    """
    with captured_log() as logs:
        try:
            container = av.open(
                path,
                options={
                    "max_pixels": str(_guard_pixels(limits)),
                    "codec_whitelist": ",".join(DECODERS),
                    "threads": str(threads),
                },
                container_options={
                    "format_whitelist": ",".join(FORMATS),
                    "protocol_whitelist": ",".join(PROTOCOLS),
                },
                metadata_errors="replace",
            )
        except av.FFmpegError as error:
            raise _refusal(error, logs) from None
    if log is not None:
        log.extend(logs)
    try:
        check_logged_pixels(logs, limits)
    except ServiceError:
        container.close()
        raise
    return container


def _guard_pixels(limits: VideoConfig) -> int:
    """FFmpeg's own limit, which stops a bomb before its memory is allocated.

    It counts decoders' padding, so it must be wider than ours, which is checked exactly where
    a size is known.
    """
    return 2 * limits.max_frame_pixels + (1 << 16)


def read_packets(
    container: InputContainer, *streams: _Stream, on_error: Callable[[], None] = lambda: None
) -> Iterator[Packet[_Stream]]:
    """The packets of ``streams`` to the file's end, past what cannot be read; then empty ones.

    Args:
        container: where reading goes on.
        streams: of the container.
        on_error: called for each place that cannot be read.

    Raises:
        av.FFmpegError: the file cannot be read for another reason than its content.
    """
    failures = 0
    while failures < _MAX_FAILURES:
        try:
            for packet in cast("Iterator[Packet[_Stream]]", container.demux(*streams)):
                failures = 0
                yield packet
            return
        except (av.error.InvalidDataError, av.error.PatchWelcomeError):
            failures += 1
            on_error()
        except av.error.EOFError:
            break
    for stream in streams:
        last = cast("Packet[_Stream]", Packet())
        last.stream = stream
        yield last


def decode_packet(
    packet: Packet[VideoStream],
    limits: VideoConfig,
    *,
    on_damaged: Callable[[], None] = lambda: None,
) -> list[VideoFrame]:
    """The frames that come out for a packet; none for a damaged one, as in any serial reader.

    Args:
        packet: of the video; an empty one drains the decoder.
        limits: what must be refused.
        on_damaged: called for a damaged packet.

    Raises:
        ServiceError: VIDEO_LIMIT_EXCEEDED.
        MemoryError: there was no memory for the frame.
    """
    return _decode(packet.stream.codec_context, packet, limits, on_damaged)


def drain_decoder(stream: VideoStream, limits: VideoConfig) -> list[VideoFrame]:
    """The frames that a decoder still has; it has to be sought with before it decodes more.

    Raises:
        ServiceError: VIDEO_LIMIT_EXCEEDED.
        MemoryError: there was no memory for a frame.
    """
    return _decode(stream.codec_context, None, limits, lambda: None)


def _decode(
    context: VideoCodecContext,
    packet: Packet[VideoStream] | None,
    limits: VideoConfig,
    on_damaged: Callable[[], None],
) -> list[VideoFrame]:
    with av.logging.Capture(local=False) as logs:
        try:
            return context.decode(None) if packet is None else packet.decode()
        except av.FFmpegError as error:
            _check_memory(context, error)
            if isinstance(error, _DAMAGED):
                on_damaged()
                return []
            if isinstance(error, av.error.EOFError):
                return []
            raise
        finally:
            check_logged_pixels(logs, limits)


def _check_memory(context: VideoCodecContext, error: Exception) -> None:
    """Raise MemoryError if there is no room for a frame: FFmpeg calls such frames damaged."""
    size = context.width * context.height * _FRAME_BYTES_PER_PIXEL
    try:
        mmap.mmap(-1, max(size, mmap.PAGESIZE)).close()
    except OSError:
        raise MemoryError from error


def _refusal(error: av.FFmpegError, logs: FFmpegLog) -> ServiceError:
    """Why FFmpeg would not open a file, from its log: the error number does not tell."""
    for _, name, text in logs:
        if "not on whitelist" in text or "m3u8/hls" in text:
            kind = name if "not on whitelist" in text else "hls"
            why = _EXPLAINED.get(kind, f"files of format {kind!r} are not accepted")
            return ServiceError(
                Reason.FORMAT_NOT_ALLOWED,
                f"{why}; accepted: {', '.join(FORMATS)}",
                format=kind,
                accepted=",".join(FORMATS),
            )
    if isinstance(error, av.error.MemoryError):
        raise MemoryError from error
    return ServiceError(Reason.NOT_A_VIDEO, f"not a video file: {error.strerror}")


def check_logged_pixels(logs: FFmpegLog, limits: VideoConfig) -> None:
    """Raise VIDEO_LIMIT_EXCEEDED if a frame's size stopped FFmpeg, which only its log says.

    The line is "Picture size 8192x8192 exceeds specified max pixel count 9437184, see ..."; or
    "Picture size 16384x16384 is invalid" beyond what FFmpeg can address.
    """
    for _, _, text in logs:
        if found := _REFUSED_SIZE.match(text):
            width, height = (int(part) for part in found.groups())
            if width * height > limits.max_frame_pixels or _PIXELS_LOG in text:
                raise pixels_exceeded(width, height, limits)


def pixels_exceeded(width: int, height: int, limits: VideoConfig) -> ServiceError:
    """VIDEO_LIMIT_EXCEEDED for a frame of more than ``max_frame_pixels``."""
    return limit_exceeded(
        "max_frame_pixels",
        width * height,
        limits.max_frame_pixels,
        f"its frames are {width}x{height} = {width * height} pixels",
    )


def limit_exceeded(limit: str, value: float, maximum: float, what: str) -> ServiceError:
    """VIDEO_LIMIT_EXCEEDED in the form every limit uses."""
    return ServiceError(
        Reason.VIDEO_LIMIT_EXCEEDED,
        f"the video is refused: {what}; the limit {limit} is {maximum}",
        limit=limit,
        value=value,
        maximum=maximum,
    )


def video_stream(container: InputContainer, limits: VideoConfig) -> VideoStream:
    """The first stream of moving pictures (a cover image does not count), checked.

    Raises:
        ServiceError: NO_VIDEO_STREAM, FORMAT_NOT_ALLOWED (codec), VIDEO_LIMIT_EXCEEDED.
    """
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            break
    else:
        kinds = ",".join(s.type for s in container.streams) or "none"
        raise ServiceError(
            Reason.NO_VIDEO_STREAM,
            f"the file has no stream of moving pictures; its streams: {kinds}",
            streams=kinds,
        )
    context = stream.codec_context
    if context is None or context.codec.name not in DECODERS:
        name = "unknown" if context is None else context.codec.name
        raise ServiceError(
            Reason.FORMAT_NOT_ALLOWED,
            f"video codec {name!r} is not accepted; accepted: {', '.join(DECODERS)}",
            codec=name,
            accepted=",".join(DECODERS),
        )
    if context.width * context.height > limits.max_frame_pixels:
        raise pixels_exceeded(context.width, context.height, limits)
    # The options of open() reach FFmpeg's probing only, not the context that will decode: a
    # stream may change its size on the way.
    context.options = {**context.options, "max_pixels": str(_guard_pixels(limits))}
    return stream
