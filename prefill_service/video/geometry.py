"""How large the frames of a video are, as they are stored and as they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

_TOLERANCE = 2  # pixels: bars that are thinner come from rounding


@dataclass(frozen=True, slots=True)
class FrameSize:
    """A size that frames of a video are stored in.

    Attributes:
        width, height: pixels, not turned.
        frames: how many have it; an estimate where not all frames were looked at.
    """

    width: int
    height: int
    frames: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """From stored pixels to an upright picture of square pixels.

    A frame is stretched to square pixels, then turned upside down if it is ``mirrored``, then
    turned by ``rotation``. A display matrix of 90 degrees and more, or of a mirror, says so.

    Attributes:
        width, height: pixels of a frame as it is shown.
        stored_width, stored_height: pixels of a frame as most are stored.
        rotation: degrees (0, 90, 180, 270), counter-clockwise.
        mirrored: whether the picture is turned upside down before it is rotated.
        sample_aspect_ratio: width over height of a stored pixel, as (numerator, denominator).
        sizes: those that occur, that of most frames first; at most 16.
    """

    width: int
    height: int
    stored_width: int
    stored_height: int
    rotation: int = 0
    mirrored: bool = False
    sample_aspect_ratio: tuple[int, int] = (1, 1)
    sizes: tuple[FrameSize, ...] = ()

    @classmethod
    def square(cls, width: int, height: int, frames: int) -> Geometry:
        """The geometry of upright frames that all have one size, and square pixels."""
        sizes = (FrameSize(width, height, frames),)
        return cls(
            width=width, height=height, stored_width=width, stored_height=height, sizes=sizes
        )

    def lists_size(self, width: int, height: int) -> bool:
        """Whether the index found frames that are stored in ``width`` x ``height``."""
        return any((size.width, size.height) == (width, height) for size in self.sizes)

    @property
    def lies(self) -> bool:
        """Whether a frame is turned by a quarter."""
        return self.rotation in (90, 270)

    def with_square_pixels(self) -> Geometry:
        """The geometry of the same frames, their pixels taken as square."""
        size = (self.stored_width, self.stored_height)
        width, height = size[::-1] if self.lies else size
        return replace(self, width=width, height=height, sample_aspect_ratio=(1, 1))

    @property
    def display_hw(self) -> tuple[int, int]:
        """Height and width of a frame as it is shown."""
        return self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """JSON form, the inverse of ``from_dict``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Geometry:
        """Rebuild a geometry from its JSON form."""
        numerator, denominator = data["sample_aspect_ratio"]
        sizes = tuple(FrameSize(**size) for size in data["sizes"])
        ratio = (int(numerator), int(denominator))
        return cls(**{**data, "sample_aspect_ratio": ratio, "sizes": sizes})


@dataclass(frozen=True, slots=True)
class Fit:
    """How a decoded frame of any size becomes one of square pixels, before it is turned.

    Attributes:
        width, height: pixels to scale it to.
        canvas_hw: height and width of the whole picture; what is left around it is black.
    """

    width: int
    height: int
    canvas_hw: tuple[int, int]

    @classmethod
    def of(cls, geometry: Geometry, width: int, height: int) -> Fit:
        """The fit of a frame of ``width`` x ``height``, whose pixels are like the others'."""
        canvas = geometry.display_hw[::-1] if geometry.lies else geometry.display_hw
        canvas_h, canvas_w = canvas
        # Its size once its pixels are square, in parts of the canvas.
        share_w = width / geometry.stored_width
        share_h = height / geometry.stored_height
        largest = max(share_w, share_h)
        fit_w = max(1, round(canvas_w * share_w / largest))
        fit_h = max(1, round(canvas_h * share_h / largest))
        if fit_w + _TOLERANCE >= canvas_w and fit_h + _TOLERANCE >= canvas_h:
            return cls(canvas_w, canvas_h, canvas)
        return cls(fit_w, fit_h, canvas)

    def paste(self, picture: np.ndarray) -> np.ndarray:
        """The whole picture, [height, width, 3] uint8, with the scaled one in its middle."""
        if picture.shape[:2] == self.canvas_hw:
            return picture
        canvas = np.zeros((*self.canvas_hw, 3), np.uint8)
        top = (self.canvas_hw[0] - self.height) // 2
        left = (self.canvas_hw[1] - self.width) // 2
        canvas[top : top + self.height, left : left + self.width] = picture
        return canvas
