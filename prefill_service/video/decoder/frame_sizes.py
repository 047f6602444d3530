"""The sizes of a video's frames, from those that are decoded for its index.

Packets do not say how large their frames are. A stream changes its size at a keyframe (joined
recordings, a call whose bandwidth grows), so keyframes are decoded: up to ``_MAX_SAMPLES`` of
them, evenly spread, and more between two of different sizes until the change is found. What
begins and ends between two of them is missed here. So are changes at other frames, which VP9
and AV1 allow. PyAV's reader counts frames of such sizes among those asked for
(``FrameReader.unlisted``), and the answer's warnings say how many; OpenCV's cannot.

The size of most frames is the video's. Its sample aspect ratio is the container's, as in FFmpeg
and players, and the codec's where the container has none. A ratio beyond ``_MAX_RATIO`` is a
mistake, and pixels are taken as square.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prefill_service.video.geometry import FrameSize, Geometry
from prefill_service.video.index import VideoWarning, WarningReason

_MAX_SAMPLES = 64
_MAX_PIXELS = 150_000_000  # decoded for the sizes: a second or two of a CPU
_LEAST_SAMPLES = 4
_MAX_RATIO = 10
_KEPT_SIZES = 16
_LISTED_SIZES = 5
_QUARTER = 90
_SAME_RATIO = 0.01  # containers round it


class StoredSize(NamedTuple):
    """Size of a decoded frame, and the sample aspect ratio in its stream; 0: not in it."""

    width: int
    height: int
    ratio: Fraction


@dataclass(frozen=True, slots=True)
class Shown:
    """How the container says that frames are shown.

    Attributes:
        ratio: sample aspect ratio of the first frames, by container or codec; 0 if unknown.
        by_container: whether it is not the codec's.
        degrees: to turn frames by, counter-clockwise, after ``mirrored``.
        mirrored: whether they are turned upside down first.
    """

    ratio: Fraction
    by_container: bool
    degrees: float
    mirrored: bool

    @classmethod
    def of_stream(cls, stream: VideoStream, first: VideoFrame) -> Shown:
        """What a stream and its first frame say."""
        matrix = first.side_data.get("DISPLAYMATRIX")
        mirrored = False
        if matrix is not None:
            assert isinstance(matrix, SideData)
            a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
            mirrored = bool(a * d - b * c < 0)
        ratio = Fraction(stream.sample_aspect_ratio or 0)
        by_container = ratio != stored_size(stream, first).ratio
        return cls(
            ratio=ratio,
            by_container=by_container,
            degrees=float(first.rotation),
            mirrored=mirrored,
        )


def stored_size(stream: VideoStream, frame: VideoFrame) -> StoredSize:
    """The size of the frame that was decoded last."""
    ratio = stream.codec_context.sample_aspect_ratio
    return StoredSize(frame.width, frame.height, Fraction(ratio or 0))


@dataclass(slots=True)
class SizeRuns:
    """Sizes of consecutive frames, decoded one after another from the first.

    Attributes:
        frames: how many they are.
        starts: where each size begins, and that size.
    """

    frames: int = 0
    starts: list[tuple[int, StoredSize]] = field(default_factory=list)

    def append(self, size: StoredSize) -> None:
        """Note the next frame's size."""
        if not self.starts or self.starts[-1][1] != size:
            self.starts.append((self.frames, size))
        self.frames += 1

    def ends(self) -> dict[int, StoredSize]:
        """The first and the last frame of each run, with their size."""
        found = {}
        for number, (start, size) in enumerate(self.starts):
            last = number + 1 == len(self.starts)
            found[start] = size
            found[(self.frames if last else self.starts[number + 1][0]) - 1] = size
        return found


def survey_sizes(
    runs: SizeRuns,
    frames: int,
    keyframes: np.ndarray,
    decode: Callable[[int], tuple[int, StoredSize] | None],
) -> Counter[StoredSize]:
    """How many frames have which size, decoding as few keyframes as tell.

    Args:
        runs: of the frames at the beginning that have been decoded.
        frames: how many there are.
        keyframes: [keyframes] int64, ascending frame numbers.
        decode: decodes the keyframe of a number; returns the frame that came and its size.
    """
    found = {number: size for number, size in runs.ends().items() if number < frames}
    largest = max(size.width * size.height for size in found.values())
    budget = min(_MAX_SAMPLES, max(_LEAST_SAMPLES, _MAX_PIXELS // max(1, largest)))
    unknown = keyframes[keyframes >= runs.frames].tolist()
    picks = np.linspace(0, len(unknown) - 1, min(len(unknown), budget * 2 // 3)).round()
    waiting = [unknown[place] for place in dict.fromkeys(picks.astype(int).tolist())]
    while budget > 0:
        number = waiting.pop() if waiting else _next_between(found, unknown)
        if number is None:
            break
        unknown.remove(number)
        budget -= 1
        if (one := decode(number)) is not None:
            found[one[0]] = one[1]
    return _count(found, frames, keyframes)


def _count(found: dict[int, StoredSize], frames: int, keyframes: np.ndarray) -> Counter[StoredSize]:
    """Frames of each size; those between two equal ones have the same."""
    counts: Counter[StoredSize] = Counter()
    numbers = sorted(found)
    for before, after in zip(numbers, [*numbers[1:], frames], strict=True):
        change = after
        if after < frames and found[before] != found[after]:
            inside = keyframes[(keyframes > before) & (keyframes <= after)]
            change = int(inside[len(inside) // 2]) if len(inside) else after
            counts[found[after]] += after - change
        counts[found[before]] += change - before
    return counts


def _next_between(found: dict[int, StoredSize], unknown: list[int]) -> int | None:
    """A keyframe in the middle of two neighbours of different sizes."""
    numbers = sorted(found)
    for before, after in pairwise(numbers):
        if found[before] != found[after]:
            inside = [number for number in unknown if before < number < after]
            if inside:
                return inside[len(inside) // 2]
    return None


def choose_geometry(
    sizes: Counter[StoredSize], shown: Shown, max_pixels: int
) -> tuple[Geometry, list[VideoWarning]]:
    """The geometry of a video, and what is unusual about it.

    Args:
        sizes: how many frames have which.
        shown: how the container wants them shown.
        max_pixels: most pixels that a frame with square pixels may have.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for size, frames in sizes.items():
        counts[size.width, size.height] += frames
    common = counts.most_common(_KEPT_SIZES)
    listed = tuple(FrameSize(width, height, frames) for (width, height), frames in common)
    stored = listed[0]
    ratio, warnings = _choose_ratio(sizes, stored, shown)
    width, height = _square(stored, ratio, max_pixels)
    if len(listed) > 1:
        warnings.append(_changing(listed, width, height))
    if ratio != 1:
        warnings.append(_stretched(stored, ratio, f"{width} x {height}"))
    rotation = round(shown.degrees / _QUARTER) * _QUARTER % 360
    if abs(shown.degrees - round(shown.degrees / _QUARTER) * _QUARTER) > 1:
        message = f"the file says to turn frames by {shown.degrees:g} degrees, which are turned by"
        warnings.append(VideoWarning(WarningReason.ORIENTATION, f"{message} {rotation}"))
    if rotation in (90, 270):
        width, height = height, width
    geometry = Geometry(
        width=width,
        height=height,
        stored_width=stored.width,
        stored_height=stored.height,
        rotation=rotation,
        mirrored=shown.mirrored,
        sample_aspect_ratio=(ratio.numerator, ratio.denominator),
        sizes=listed,
    )
    return geometry, warnings


def _choose_ratio(
    sizes: Counter[StoredSize], stored: FrameSize, shown: Shown
) -> tuple[Fraction, list[VideoWarning]]:
    """The sample aspect ratio of frames of the size of most: 1 for an unknown one or a mistake."""
    ratios: Counter[Fraction] = Counter()
    for size, frames in sizes.items():
        if (size.width, size.height) == (stored.width, stored.height):
            ratios[size.ratio] += frames
    of_codec = ratios.most_common(1)[0][0]
    ratio = shown.ratio if shown.by_container else of_codec or shown.ratio
    if ratio <= 0:
        return Fraction(1), []
    if not Fraction(1, _MAX_RATIO) <= ratio <= _MAX_RATIO:
        message = (
            f"the sample aspect ratio {_name(ratio)} is taken for a mistake, as is any beyond "
            f"{_MAX_RATIO}:1: pixels are taken as square"
        )
        return Fraction(1), [VideoWarning(WarningReason.PIXEL_ASPECT, message)]
    warnings = []
    if of_codec > 0 and abs(ratio / of_codec - 1) > _SAME_RATIO:
        message = (
            f"the container's sample aspect ratio is {_name(ratio)}, that in the codec's header "
            f"{_name(of_codec)}: the container's is used"
        )
        warnings.append(VideoWarning(WarningReason.PIXEL_ASPECT, message))
    if len(ratios) > 1:
        names = ", ".join(_name(one) for one in sorted(ratios))
        message = f"the sample aspect ratio changes on the way ({names}): {_name(ratio)} is used"
        warnings.append(VideoWarning(WarningReason.PIXEL_ASPECT, message))
    return ratio, warnings


def _name(ratio: Fraction) -> str:
    return f"{ratio.numerator}:{ratio.denominator}"


def _square(stored: FrameSize, ratio: Fraction, max_pixels: int) -> tuple[int, int]:
    """Size of a frame with square pixels: no pixel is lost, unless it would be too large."""
    enlarge = stored.width * stored.height * max(ratio, 1 / ratio) <= max_pixels
    if (ratio > 1) == enlarge:
        return max(1, round(stored.width * ratio)), stored.height
    return stored.width, max(1, round(stored.height / ratio))


def _changing(sizes: tuple[FrameSize, ...], width: int, height: int) -> VideoWarning:
    names = [f"{size.width} x {size.height} ({size.frames} frames)" for size in sizes]
    more = len(names) - _LISTED_SIZES
    tail = f" and {more} others" if more > 0 else ""
    return VideoWarning(
        WarningReason.SIZE_CHANGES,
        f"frames change their size on the way, about so: {', '.join(names[:_LISTED_SIZES])}{tail}; "
        f"all are fitted into {width} x {height}, with black bars where their shape is another",
    )


def _stretched(stored: FrameSize, ratio: Fraction, to: str) -> VideoWarning:
    return VideoWarning(
        WarningReason.PIXEL_ASPECT,
        f"pixels are not square (sample aspect ratio {_name(ratio)}): frames of "
        f"{stored.width} x {stored.height} are shown as {to}; vLLM takes them as they are stored, "
        "and so does sampling.square_pixels",
    )
