"""Write synthetic videos whose content moves and changes scene.

python -m tools.make_video out.mp4 --seconds 120 --codec libx264
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import cv2
import numpy as np

SCENE_S = 5.0
DISCS = 4


def render_frames(
    seconds: float, fps: float, width: int, *, height: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield ``round(seconds * fps)`` BGR frames [height, width, 3] uint8.

    Each scene of five seconds has its own background and discs, which drift and bounce, so
    every frame differs from its neighbours and every scene from the others.
    """
    size = np.array([width, height])
    for index in range(round(seconds * fps)):
        scene, within = divmod(index / fps, SCENE_S)
        rng = np.random.default_rng((seed, int(scene)))
        top, bottom = rng.uniform(0, 255, (2, 3))
        ramp = np.linspace(0, 1, height)[:, None, None]
        column = top * (1 - ramp) + bottom * ramp  # [height, 1, 3]
        frame = np.broadcast_to(column, (height, width, 3)).astype(np.uint8, order="C")
        for _ in range(DISCS):
            start = rng.uniform(0, size)
            speed = rng.uniform(-0.4, 0.4, 2) * size
            radius = max(2, int(rng.uniform(0.08, 0.22) * min(width, height)))
            colour = rng.integers(0, 256, 3).tolist()
            position = np.abs((start + speed * within) % (2 * size) - size)
            cv2.circle(frame, position.astype(int).tolist(), radius, colour, -1, cv2.LINE_AA)
        yield frame


def write_video(
    path: Path,
    seconds: float = 2.0,
    fps: float = 25.0,
    *,
    width: int = 320,
    height: int = 240,
    seed: int = 0,
    codec: str = "mp4v",
) -> Path:
    """Write a video and return ``path``; its suffix picks the container.

    Args:
        path: file to write, replaced if it exists.
        seconds, fps: length and frame rate.
        width, height: pixels; odd sizes only with codecs that take them.
        seed: of the content.
        codec: a four-character code is written with OpenCV, anything else is the name of an
            FFmpeg encoder (``libx264``, ``libx265``, ``libvpx-vp9``, ...), written with PyAV.

    Raises:
        RuntimeError: OpenCV cannot write this codec or container.
    """
    frames = render_frames(seconds, fps, width, height=height, seed=seed)
    if len(codec) == 4:
        _write_opencv(path, frames, fps, size=(width, height), codec=codec)
    else:
        _write_pyav(path, frames, fps, size=(width, height), codec=codec)
    return path


def _write_opencv(
    path: Path, frames: Iterator[np.ndarray], fps: float, *, size: tuple[int, int], codec: str
) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
    try:
        if not writer.isOpened():
            raise RuntimeError(f"OpenCV cannot write {codec} into {path.name}")
        for frame in frames:
            writer.write(frame)
    finally:
        writer.release()


def _write_pyav(
    path: Path, frames: Iterator[np.ndarray], fps: float, *, size: tuple[int, int], codec: str
) -> None:
    with av.open(str(path), "w") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
        container.mux(stream.encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="%(default)s")
    parser.add_argument("--fps", type=float, default=25.0, help="%(default)s")
    parser.add_argument("--width", type=int, default=320, help="%(default)s")
    parser.add_argument("--height", type=int, default=240, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="%(default)s")
    parser.add_argument("--codec", default="mp4v", help="%(default)s")
    print(write_video(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
