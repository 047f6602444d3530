"""The demo's picture: attention over the video's time, above frames of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from prefill_client import PatchAttention

from tools.needle.stories import COLORS, Needle, Story
from tools.needle.videos import read_frames

FRAMES = 14
_SIZE_INCHES = (14.0, 5.2)
_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "cross": "P",
    "ring": "o",  # hollow
    "star": "*",
}


@dataclass(frozen=True, slots=True)
class Contrast:
    """How far needles stand out.

    Attributes:
        needles: attention mass of each second that shows one, ascending.
        background: the largest of the other seconds.
    """

    needles: tuple[float, ...]
    background: float

    def __str__(self) -> str:
        above = sum(mass > self.background for mass in self.needles)
        return (
            f"{self.needles[0]:.1f} to {self.needles[-1]:.1f} where a shape is seen, "
            f"{self.background:.1f} at most elsewhere ({above} of {len(self.needles)} above that)"
        )


def contrast(story: Story, patches: Sequence[PatchAttention]) -> Contrast:
    """Of a job's attention over time, one entry per second of the story.

    Raises:
        ValueError: there are more seconds in the story, or fewer.
    """
    if len(patches) != story.patches:
        raise ValueError(f"{len(patches)} masses for {story.patches} temporal patches")
    shows = np.array([needle is not None for needle in story.events()])
    mass = np.array([patch.mass for patch in patches])
    return Contrast(tuple(sorted(mass[shows].tolist())), float(mass[~shows].max()))


def moments(story: Story, count: int = FRAMES) -> list[int]:
    """``count`` seconds, ascending: those with a needle, and the middles of the widest gaps."""
    chosen = sorted(patch for needle in story.needles for patch in needle.patches)
    while len(chosen) < count:
        edges = [-1, *chosen, story.patches]
        before, after = max(pairwise(edges), key=lambda gap: gap[1] - gap[0])
        chosen = sorted([*chosen, (before + after) // 2])
    return chosen


def draw(
    path: Path,
    video: Path,
    story: Story,
    *,
    fps: int,
    masses: Mapping[str, Sequence[PatchAttention]],
) -> None:
    """Write a PNG.

    Args:
        path: of the picture.
        video: the story as ``write_mp4`` wrote it, at ``fps``.
        story: what it shows.
        fps: frames per second of the file.
        masses: attention over time by quality; the first is filled, others are lines.
    """
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the environment says
    shown = moments(story)
    grid = figure.add_gridspec(2, len(shown), height_ratios=(2.6, 1))
    top = figure.add_subplot(grid[0, :])
    _over_time(top, masses)
    _needles(top, story)
    frames = read_frames(video)
    events = story.events()
    for column, second in enumerate(shown):
        axes = figure.add_subplot(grid[1, column])
        _frame(axes, frames[second * fps + fps // 2], second, events[second])
        figure.add_artist(
            ConnectionPatch(
                (second + 0.5, 0),
                (0.5, 1),
                top.get_xaxis_transform(),
                axes.transAxes,
                color=_ink(events[second]),
                linewidth=0.8 if events[second] is None else 1.6,
                zorder=-1,
            )
        )
    figure.savefig(path, format="png", dpi=110)


def _over_time(axes: Axes, masses: Mapping[str, Sequence[PatchAttention]]) -> None:
    for number, (quality, patches) in enumerate(masses.items()):
        edges = [*(patch.time_s for patch in patches), patches[-1].time_s + 1.0]
        values = [patch.mass for patch in patches]
        if number == 0:
            axes.stairs(values, edges, fill=True, color="tab:blue", alpha=0.55, label=quality)
        else:
            axes.stairs(values, edges, color="black", linewidth=0.8, label=quality)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    highest = max(patch.mass for patches in masses.values() for patch in patches)
    end = max(len(patches) for patches in masses.values())
    axes.set(xlim=(0, end), ylim=(0, 1.25 * max(highest, 1.0)))
    axes.set_title(
        "attention to each second of the video from (sampled) tokens after it; 1: chance"
    )
    axes.set_ylabel("attention mass")
    axes.set_xlabel("seconds of the video", loc="right")
    axes.legend(loc="upper left", frameon=False)
    for label in axes.get_xticklabels():  # lines to the frames pass below them
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})


def _needles(axes: Axes, story: Story) -> None:
    """A mark for each, of its shape and colour, along the upper edge."""
    transform = axes.get_xaxis_transform()
    for needle in story.needles:
        for patch in needle.patches:
            axes.plot(
                [patch + 0.5],
                [0.92],
                _MARKERS[needle.shape],
                transform=transform,
                color=_rgb(needle),
                fillstyle="none" if needle.shape == "ring" else "full",
                markersize=16 if needle.shape == "star" else 12,
                markeredgewidth=3.5 if needle.shape == "ring" else 0.5,
                markeredgecolor=_rgb(needle) if needle.shape == "ring" else "black",
            )


def _frame(axes: Axes, frame: np.ndarray, second: int, needle: Needle | None) -> None:
    axes.imshow(frame)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(f"{second} s", fontsize=9)
    for spine in axes.spines.values():
        spine.set(color=_ink(needle), linewidth=1.0 if needle is None else 3.0)


def _rgb(needle: Needle) -> tuple[float, float, float]:
    red, green, blue = COLORS[needle.color]
    return red / 255, green / 255, blue / 255


def _ink(needle: Needle | None) -> tuple[float, float, float]:
    return (0.75, 0.75, 0.75) if needle is None else _rgb(needle)
