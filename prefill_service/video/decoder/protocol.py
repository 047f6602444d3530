"""Messages between a decoder process and its parent: a JSON header and raw bytes."""

from __future__ import annotations

import json
import os
import struct
from typing import Any, BinaryIO

import numpy as np

from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, warnings_from_pairs

PREFIX = struct.Struct("<IQ")  # bytes of the JSON header, bytes of the payload
MAX_HEADER_BYTES = 64 << 10
BYTES_PER_FRAME = 17  # of an index: pts, time, keyframe flag

Header = dict[str, Any]


def pack(header: Header, payload_bytes: int) -> bytes:
    """The bytes of a message that go before its payload."""
    text = json.dumps(header).encode()
    return PREFIX.pack(len(text), payload_bytes) + text


def write_message(fd: int, header: Header, payload: bytes | memoryview = b"") -> None:
    """Write one message; blocks while the pipe is full, which is the back-pressure."""
    for part in (pack(header, len(payload)), payload):
        view = memoryview(part)
        while view:
            view = view[os.write(fd, view) :]


def read_message(file: BinaryIO) -> tuple[Header, bytes]:
    """Read one whole message from a blocking file.

    Raises:
        EOFError: the file ends within the message.
    """
    header_bytes, payload_bytes = PREFIX.unpack(_read_exactly(file, PREFIX.size))
    header: Header = json.loads(_read_exactly(file, header_bytes))
    return header, _read_exactly(file, payload_bytes)


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise EOFError(f"wanted {size} bytes, got {len(data)}")
    return data


def index_to_message(index: VideoIndex) -> tuple[Header, bytes]:
    """An index as header and payload."""
    header = {
        "type": "index",
        "container": index.container,
        "codec": index.codec,
        "geometry": index.geometry.to_dict(),
        "time_base": list(index.time_base),
        "fps": index.fps,
        "duration_s": index.duration_s,
        "frames": index.frame_count,
        "warnings": [(warning.reason, warning.message) for warning in index.warnings],
    }
    parts = (index.pts, index.times_s, index.keyframe.astype(np.uint8))
    return header, b"".join(part.tobytes() for part in parts)


def index_from_message(header: Header, payload: bytes) -> tuple[VideoIndex, bytes]:
    """The inverse of ``index_to_message``, and what follows the index in the payload.

    Raises:
        ValueError: the message is not a sound index.
    """
    frames = int(header["frames"])
    if frames < 1 or len(payload) < BYTES_PER_FRAME * frames:
        raise ValueError(f"{len(payload)} bytes for {frames} frames")
    pts = np.frombuffer(payload, np.int64, frames)
    times_s = np.frombuffer(payload, np.float64, frames, offset=8 * frames)
    if (np.diff(pts) <= 0).any() or not (np.diff(times_s) > 0).all() or times_s[0] != 0:
        raise ValueError("times do not ascend from 0")
    numerator, denominator = (int(part) for part in header["time_base"])
    index = VideoIndex(
        container=str(header["container"]),
        codec=str(header["codec"]),
        geometry=Geometry.from_dict(header["geometry"]),
        time_base=(numerator, denominator),
        pts=pts,
        keyframe=np.frombuffer(payload, np.uint8, frames, offset=16 * frames).astype(bool),
        times_s=times_s,
        fps=float(header["fps"]),
        duration_s=float(header["duration_s"]),
        warnings=warnings_from_pairs(header["warnings"]),
    )
    return index, payload[BYTES_PER_FRAME * frames :]
