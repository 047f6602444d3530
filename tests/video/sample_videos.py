"""Small deterministic videos whose frames show their own number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

MILLISECONDS = Fraction(1, 1000)
BITS = 8
H264 = {"g": "10", "bf": "2", "preset": "veryfast"}


def numbered_frame(number: int, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: the number as 8 blocks on top, a red mark at the lower left."""
    frame = np.full((height, width, 3), 40, np.uint8)
    block = width // BITS
    for bit in range(BITS):
        if number >> bit & 1:
            frame[: height // 3, bit * block : (bit + 1) * block] = 220
    frame[-height // 4 :, : width // 4] = (220, 20, 20)
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number drawn by ``numbered_frame``."""
    height, width, _ = frame.shape
    block = width // BITS
    row = frame[: height // 4].mean(axis=(0, 2))
    return sum(int(row[b * block + 2 : (b + 1) * block - 2].mean() > 130) << b for b in range(BITS))


@dataclass(frozen=True)
class Settings:
    """How a sample is encoded and muxed.

    Attributes:
        size: width and height, pixels.
        times_ms: presentation times of the frames; None: 10 frames per second.
        options: of the encoder; None: those of H264.
        container_options: of the muxer.
        rotation: degrees that a player is to turn the frames.
        shift_ms: moves all timestamps.
        pixel_aspect: sample aspect ratio, for the container and the codec.
        pix_fmt: FFmpeg's name of the pixel format.
        rate: frames per second, of codecs that count frames.
        container_format: FFmpeg's name of the format; None: by the file's suffix.
    """

    size: tuple[int, int] = (96, 64)
    times_ms: Sequence[int] | None = None
    options: dict[str, str] | None = None
    container_options: dict[str, str] = field(default_factory=dict)
    rotation: int = 0
    shift_ms: int = 0
    pixel_aspect: Fraction = Fraction(1)
    pix_fmt: str = "yuv420p"
    container_format: str | None = None
    rate: int = 10


def make_video(path: Path, codec: str = "libx264", frames: int = 40, **settings: Any) -> Path:
    """Write frames 0, 1, ...; ``settings`` are those of ``Settings``."""
    how = Settings(**settings)
    times = range(0, 100 * frames, 100) if how.times_ms is None else how.times_ms
    options = H264 if how.options is None else how.options
    counts_frames = codec in (
        "mpeg4",
        "mpeg2video",
        "dvvideo",
    )  # these want the frame rate as time base
    with av.open(
        str(path), "w", format=how.container_format, options=how.container_options
    ) as file:
        stream = file.add_stream(codec, rate=how.rate, options=options)
        stream.width, stream.height = how.size
        stream.pix_fmt = how.pix_fmt
        stream.codec_context.thread_count = 1
        if not counts_frames:
            stream.codec_context.time_base = MILLISECONDS
        if how.pixel_aspect != 1:
            stream.codec_context.sample_aspect_ratio = how.pixel_aspect
        if how.rotation:
            stream.set_display_rotation(how.rotation)

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                if how.shift_ms:
                    shift = round(Fraction(how.shift_ms, 1000) / packet.time_base)
                    packet.pts += shift
                    packet.dts += shift
                file.mux(packet)

        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *how.size), format="rgb24")
            frame.pts = number if counts_frames else time
            frame.time_base = Fraction(1, how.rate) if counts_frames else MILLISECONDS
            mux(stream.encode(frame))
        mux(stream.encode())
    return path


def make_audio(path: Path, cover: bool = False) -> Path:
    """A second of silence, optionally with a cover picture as a video stream."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        picture = None
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width = 64
            picture.height = 64
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(numbered_frame(0, 64, 64), format="rgb24")
            image.pts = 0
            for packet in [*picture.encode(image.reformat(format="yuvj420p")), *picture.encode()]:
                file.mux(packet)
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 8000
            frame.pts = start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def serial_pts(path: Path) -> list[int | None]:
    """What a serial reader of the file sees: the times of its frames, in the order they come."""
    with av.open(str(path)) as file:
        return [frame.pts for frame in file.decode(file.streams.video[0])]


def damage_frames(path: Path, first: int, last: int) -> None:
    """Overwrite the bytes of some frames, counted in presentation order."""
    with av.open(str(path)) as file:
        packets = [(p.pts, p.pos, p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for _, pos, size in sorted(packets)[first : last + 1]:
        data[pos + 4 : pos + size] = b"\xff" * (size - 4)
    path.write_bytes(bytes(data))
