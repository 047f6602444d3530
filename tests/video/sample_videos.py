"""Small deterministic videos whose frames say their own number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

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


def make_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 40,
    *,
    size: tuple[int, int] = (96, 64),
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    shift_ms: int = 0,
    pix_fmt: str = "yuv420p",
    container_format: str | None = None,
) -> Path:
    """Write frames 0, 1, ... at 10 fps, or at ``times_ms``; ``shift_ms`` moves the timestamps."""
    times = range(0, 100 * frames, 100) if times_ms is None else times_ms
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as file:
        stream = file.add_stream(codec, rate=10, options=H264 if options is None else options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.thread_count = 1
        if codec not in ("mpeg4", "mpeg2video"):  # these want the frame rate as time base
            stream.codec_context.time_base = MILLISECONDS
        if rotation:
            stream.set_display_rotation(rotation)

        def mux(packets: list[av.Packet]) -> None:
            for packet in packets:
                if shift_ms:
                    shift = round(Fraction(shift_ms, 1000) / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                file.mux(packet)

        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame.pts, frame.time_base = time, MILLISECONDS
            if codec in ("mpeg4", "mpeg2video"):
                frame.pts, frame.time_base = number, Fraction(1, 10)
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
            picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            image = av.VideoFrame.from_ndarray(numbered_frame(0, 64, 64), format="rgb24")
            image.pts = 0
            for packet in [*picture.encode(image.reformat(format="yuvj420p")), *picture.encode()]:
                file.mux(packet)
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 8000, start
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
