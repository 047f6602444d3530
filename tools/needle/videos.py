"""Needle stories as frames and mp4 files: shapes over a drifting, low-contrast texture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from tools.needle.stories import COLORS, Needle, Story

SIDE = 96
"""Height and width of a frame in pixels."""

SAMPLED_FPS = 2
"""Frames per second that the model is shown: a temporal patch of two frames is a second."""

_SUBPIXEL = 16
"""OpenCV's fixed point: coordinates with four fractional bits."""


@dataclass(frozen=True, slots=True)
class Look:
    """How needles are shown; training saw the defaults only.

    Attributes:
        frames: of a needle's second, how many show it; 0: all.
        opacity: 1 hides the background, 0 the needle.
    """

    frames: int = 0
    opacity: float = 1.0


PLAIN = Look()


def render(
    story: Story, rng: np.random.Generator, fps: int = SAMPLED_FPS, look: Look = PLAIN
) -> Iterator[np.ndarray]:
    """Yield ``story.patches * fps`` RGB frames [SIDE, SIDE, 3] uint8."""
    texture = _background(story.patches * fps, SAMPLED_FPS / fps, rng)
    for needle in story.events():
        paint = None if needle is None else _Paint(needle, rng)
        for index in range(fps):
            frame = next(texture)
            if paint is None or index >= (look.frames or fps):
                yield frame
            else:
                yield cv2.addWeighted(paint.on(frame), look.opacity, frame, 1 - look.opacity, 0)


def write_mp4(
    path: Path, story: Story, seed: int, *, fps: int = SAMPLED_FPS, look: Look = PLAIN
) -> Path:
    """Write the story as an mp4 (MPEG-4 part 2) and return ``path``.

    Raises:
        RuntimeError: OpenCV cannot write it.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (SIDE, SIDE))
    try:
        if not writer.isOpened():
            raise RuntimeError(f"OpenCV cannot write {path}")
        for frame in render(story, np.random.default_rng(seed), fps, look):
            writer.write(frame[..., ::-1])
    finally:
        writer.release()
    return path


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video, RGB [frames, height, width, 3] uint8."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1][..., ::-1])
    capture.release()
    return np.stack(frames)


def _background(frames: int, step: float, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A window that drifts over two textures, which fade into each other; ``step`` is its speed."""
    textures = [_texture(rng) for _ in range(2)]
    corner = rng.uniform(0, 2 * SIDE, 2)
    speed = rng.uniform(-6, 6, 2) * step
    base = rng.uniform(70, 140)
    contrast = rng.uniform(15, 40)
    period = rng.integers(20, 60) / step
    for index in range(frames):
        outside = (corner + speed < 0) | (corner + speed > 2 * SIDE)
        speed = np.where(outside, -speed, speed)
        corner = np.clip(corner + speed, 0, 2 * SIDE)
        y, x = corner.astype(int)
        share = 0.5 - 0.5 * math.cos(math.pi * index / period)
        one, other = (t[y : y + SIDE, x : x + SIDE] for t in textures)
        mixed = base + contrast * ((1 - share) * one + share * other)
        yield np.clip(mixed, 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise with little colour, [3 SIDE, 3 SIDE, 3] in about [-1, 1]."""
    cells = int(rng.integers(4, 9))
    coarse = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (3 * SIDE, 3 * SIDE), interpolation=cv2.INTER_CUBIC)
    grey = smooth.mean(2, keepdims=True)
    return np.asarray(grey + 0.5 * (smooth - grey))


class _Paint:
    """A needle's place, size and shade, the same in all frames of its patch."""

    def __init__(self, needle: Needle, rng: np.random.Generator) -> None:
        self._shape = needle.shape
        self._radius = int(rng.integers(27, 40))
        low = self._radius - 2
        high = SIDE - self._radius + 3
        self._x, self._y = (int(v) for v in rng.integers(low, high, 2))
        shade = np.array(COLORS[needle.color]) + rng.integers(-12, 13, 3)
        self._color = tuple(int(v) for v in np.clip(shade, 0, 255))

    def on(self, frame: np.ndarray) -> np.ndarray:
        """A copy of the frame with the needle on it."""
        frame = np.ascontiguousarray(frame).copy()
        center = (self._x, self._y)
        r = self._radius
        if self._shape == "circle":
            cv2.circle(frame, center, r, self._color, -1, cv2.LINE_AA)
        elif self._shape == "ring":
            width = max(3, int(r * 0.36))
            cv2.circle(frame, center, int(r * 0.8), self._color, width, cv2.LINE_AA)
        else:
            for polygon in _polygons(self._shape, r):
                points = np.round((np.array(polygon) + center) * _SUBPIXEL).astype(np.int32)
                bits = int(math.log2(_SUBPIXEL))
                cv2.fillPoly(frame, [points], self._color, cv2.LINE_AA, bits)
        return frame


def _polygons(shape: str, r: float) -> list[list[tuple[float, float]]]:
    """Outlines around the origin, as (x, y)."""
    if shape == "square":
        q = 0.86 * r
        return [[(-q, -q), (q, -q), (q, q), (-q, q)]]
    if shape == "triangle":
        return [[(0, -r), (0.95 * r, 0.8 * r), (-0.95 * r, 0.8 * r)]]
    if shape == "cross":
        q = 0.3 * r
        return [
            [(-q, -r), (q, -r), (q, r), (-q, r)],
            [(-r, -q), (r, -q), (r, q), (-r, q)],
        ]
    if shape == "star":
        tips = [(r if k % 2 == 0 else 0.42 * r, k * math.pi / 5) for k in range(10)]
        return [[(length * math.sin(a), -length * math.cos(a)) for length, a in tips]]
    raise ValueError(f"shape {shape!r} is not known")
