"""Write an hour of 720p H.264 with a keyframe every eight seconds, in about a minute.

    python -m tools.make_hour_video build/hour.mp4

Encoding 108,000 frames would take most of an hour here. So a few scenes of one closed GOP each
are rendered and encoded once, and the file is put together from their packets with new times:
GOP 17 of the file is scene ``order[17]``. The order is a shuffle that never shows a scene twice in
a row, so what is seen changes at every keyframe, and moves within each GOP. To a demuxer and a
decoder the file is like any other: every packet is there, and every frame has to be decoded.

The scenes are a camera's way over a textured plane with film grain and some moving discs, and the
encoder's settings are x264's own but for the length of a GOP: three B frames in a pyramid, CABAC,
deblocking.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.packet import Packet

PIECES = 8
"""Scenes the grain repeats after."""


@dataclass(frozen=True, slots=True)
class HourOptions:
    """What the file is like.

    Attributes:
        seconds: of the whole file; rounded up to whole GOPs.
        fps: frames per second.
        width, height: pixels, even.
        gop_seconds: from one keyframe to the next.
        scenes: GOPs that are encoded; at least 2.
        preset, crf: x264's.
        bframes: at most this many B frames in a row.
        seed: of content and order.
    """

    seconds: float = 3600.0
    fps: int = 30
    width: int = 1280
    height: int = 720
    gop_seconds: float = 8.0
    scenes: int = 16
    preset: str = "veryfast"
    crf: int = 23
    bframes: int = 3
    seed: int = 0

    @property
    def gop_frames(self) -> int:
        """Frames of a GOP."""
        return round(self.gop_seconds * self.fps)

    @property
    def gops(self) -> int:
        """GOPs of the file."""
        return max(1, -(-round(self.seconds * self.fps) // self.gop_frames))


def render_scene(number: int, options: HourOptions) -> Iterator[np.ndarray]:
    """Yield the frames of one GOP, [height * 3 / 2, width] uint8 (planes of YUV 4:2:0)."""
    width = options.width
    height = options.height
    rng = np.random.default_rng((options.seed, number))
    way = np.array([width, height]) // 4  # pixels the camera moves in a scene, at most
    plane = _texture(rng, width + 2 * way[0], height + 2 * way[1])
    tint = _texture(rng, (width + 2 * way[0]) // 2, (height + 2 * way[1]) // 2)
    grain = rng.normal(0, 3, (PIECES, height, width)).astype(np.int8)
    start = rng.uniform(0, 2 * way, 2)
    end = rng.uniform(0, 2 * way, 2)
    discs = [
        (rng.uniform(0, 1, 4), int(rng.integers(20, 90)), int(rng.integers(0, 256)))
        for _ in range(6)
    ]
    picture = np.empty((height * 3 // 2, width), np.uint8)
    for index in range(options.gop_frames):
        at = index / options.gop_frames
        x, y = (start + (end - start) * at).astype(int) & ~1
        luma = plane[y : y + height, x : x + width].copy()
        for path, radius, shade in discs:
            centre = (path[:2] * (1 - at) + path[2:] * at) * (width, height)
            cv2.circle(luma, centre.astype(int).tolist(), radius, shade, -1)
        cv2.add(luma, grain[index % PIECES].astype(np.int16), dst=luma, dtype=cv2.CV_8U)
        picture[:height] = luma
        colour = tint[y // 2 : (y + height) // 2, x // 2 : (x + width) // 2]
        picture[height : height * 5 // 4] = colour.reshape(-1, width)
        picture[height * 5 // 4 :] = 255 - picture[height : height * 5 // 4]
        yield picture


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """[height, width] uint8: noise of several scales, so that there is detail everywhere."""
    total = np.zeros((height, width), np.float32)
    for cells, weight in ((4, 60.0), (16, 30.0), (64, 18.0), (200, 10.0)):
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        total += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(total + 128, 16, 235).astype(np.uint8)


def scene_order(options: HourOptions) -> list[int]:
    """The scene of each GOP; every scene as often as any other, none twice in a row."""
    rng = np.random.default_rng(options.seed)
    order: list[int] = []
    while len(order) < options.gops:
        turn = rng.permutation(options.scenes).tolist()
        if order and turn[0] == order[-1]:
            turn.append(turn.pop(0))
        order += turn
    return order[: options.gops]


def write_hour(path: Path, options: HourOptions | None = None) -> Path:
    """Write the file and return ``path``.

    Raises:
        ValueError: fewer than two scenes, or an odd size.
    """
    options = options or HourOptions()
    if options.scenes < 2:
        raise ValueError(f"scenes is {options.scenes}; it must be 2 or more")
    if options.width % 4 or options.height % 4:
        raise ValueError(
            f"the size is {options.width}x{options.height}; both must be multiples of 4"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = _add_stream(container, options)
        scenes = _encode(container, stream, options)
        time_base = cast(Fraction, stream.time_base)
        length = round(options.gop_frames / options.fps / time_base)
        for place, scene in enumerate(scene_order(options)):
            for data, pts, dts, keyframe in scenes[scene]:
                packet = Packet(data)
                packet.stream = stream
                packet.time_base = time_base
                packet.pts = pts + place * length
                packet.dts = dts + place * length
                packet.is_keyframe = keyframe
                container.mux(packet)
    return path


def _add_stream(container: OutputContainer, options: HourOptions) -> av.VideoStream:
    stream = container.add_stream(
        "libx264",
        rate=options.fps,
        options={
            "preset": options.preset,
            "crf": str(options.crf),
            "g": str(options.gop_frames),
            "keyint_min": str(options.gop_frames),
            "sc_threshold": "0",
            "bf": str(options.bframes),
            "flags": "+cgop",
        },
    )
    stream.width = options.width
    stream.height = options.height
    stream.pix_fmt = "yuv420p"
    return stream


_Scene = list[tuple[bytes, int, int, bool]]


def _encode(
    container: OutputContainer, stream: av.VideoStream, options: HourOptions
) -> list[_Scene]:
    """Packets (bytes, pts, dts, keyframe) of each scene, times counted from its beginning."""
    context = stream.codec_context
    packets: list[Packet[av.VideoStream]] = []
    for scene in range(options.scenes):
        for index, picture in enumerate(render_scene(scene, options)):
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts = scene * options.gop_frames + index
            frame.time_base = Fraction(1, options.fps)
            packets += stream.encode(frame)
    packets += stream.encode()
    # What is muxed first sets the stream's time base; packets carry the encoder's.
    container.start_encoding()
    scale = context.time_base / cast(Fraction, stream.time_base)
    scenes: list[_Scene] = []
    for packet in packets:
        if packet.is_keyframe:
            scenes.append([])
        shift = (len(scenes) - 1) * options.gop_frames
        assert packet.pts is not None
        assert packet.dts is not None
        pts, dts = (round((time - shift) * scale) for time in (packet.pts, packet.dts))
        scenes[-1].append((bytes(packet), pts, dts, packet.is_keyframe))
    return scenes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    default = HourOptions()
    for name in HourOptions.__slots__:
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="%(default)s"
        )
    arguments = vars(parser.parse_args())
    path = write_hour(arguments.pop("path"), HourOptions(**arguments))
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
