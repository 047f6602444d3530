"""The picture of ``prefill inspect``, the one part of the client that needs matplotlib."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from prefill_client.types import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INSTALL = "pip install 'prefill-client[inspect]'"
_SIZE_INCHES = (13.0, 9.0)


class PictureError(Exception):
    """The picture cannot be drawn; the message says what to do."""


def draw(inspection: Inspection, path: Path) -> None:
    """Write a PNG: density per layer and KV head, a block map, kept mass, mass over time.

    Raises:
        PictureError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError(
            f"a picture needs matplotlib ({error}): {INSTALL}, or use --json without -o"
        ) from error
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the environment says
    top = figure.add_gridspec(2, 3, height_ratios=(2.2, 1))
    _heads(figure.add_subplot(top[0, 0]), inspection)
    _block_map(figure.add_subplot(top[0, 1]), inspection)
    _kept_mass(figure.add_subplot(top[0, 2]), inspection)
    _over_time(figure.add_subplot(top[1, :]), inspection)
    figure.suptitle(_title(inspection))
    figure.savefig(path, format="png", dpi=110)


def _title(inspection: Inspection) -> str:
    job = inspection.job
    report = inspection.attention
    total = report.total
    return (
        f"{job.job_id}: {job.prefix_tokens:,} tokens, quality {report.quality} "
        f"(epsilon {report.epsilon:g}), density {total.density:.3f}, "
        f"kept mass {total.kept_mass_mean:.4f}"
    )


def _heads(axes: Axes, inspection: Inspection) -> None:
    layers = inspection.attention.layers
    axes.set_title("density per layer and KV head")
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    rows = [list(layer.head_density) for layer in layers]
    image = axes.imshow(
        rows or [[inspection.attention.total.density]],
        vmin=0,
        vmax=1,
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    axes.figure.colorbar(image, ax=axes)
    if rows:
        _ticks(axes, "x", list(range(len(rows[0]))))
        _ticks(axes, "y", [layer.layer for layer in layers])
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        _note(axes, "no layer was measured:\nall attention exact", "black")


def _ticks(axes: Axes, axis: str, labels: list[int]) -> None:
    """Choose at most a dozen tick positions."""
    step = -(-len(labels) // 12)
    ticks = range(0, len(labels), step)
    axes.set(**{f"{axis}ticks": list(ticks), f"{axis}ticklabels": [labels[i] for i in ticks]})


def _block_map(axes: Axes, inspection: Inspection) -> None:
    block_map = inspection.block_map
    tokens = inspection.job.prefix_tokens
    axes.set_xlabel("key token")
    axes.set_ylabel("query token")
    if block_map is None:
        axes.set_title("block map")
        axes.fill([0, 0, 1], [1, 0, 0], color=_dense_colour(), transform=axes.transAxes)
        axes.set(xlim=(0, max(1, tokens)), ylim=(max(1, tokens), 0))
        _note(axes, "nothing was sparse:\nevery query attends to all before it", "black")
        return
    axes.set_title(f"block map of layer {block_map.layer}, KV head {block_map.kv_head}")
    cells = [[value if value >= 0 else float("nan") for value in row] for row in block_map.density]
    image = axes.imshow(
        cells,
        vmin=0,
        vmax=1,
        extent=(0, tokens, tokens, 0),
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    axes.figure.colorbar(image, ax=axes, label="share attended")


def _dense_colour() -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](1.0)


def _kept_mass(axes: Axes, inspection: Inspection) -> None:
    report = inspection.attention
    axes.set_title("kept mass per layer")
    axes.set_xlabel("layer")
    axes.set_ylabel("1 - total variation distance from exact attention")
    sampled = [layer for layer in report.layers if layer.measures.sampled_rows]
    numbers = [layer.layer for layer in sampled]
    measures = [layer.measures for layer in sampled]
    if not sampled:
        axes.set_xticks([])
        axes.set_ylim(0, 1.05)
        axes.axhline(1.0, color="tab:blue")
        _note(axes, "not sampled:\nexact attention keeps all")
        return
    axes.locator_params("x", integer=True)
    axes.plot(numbers, [m.kept_mass_mean for m in measures], "o-", label="mean")
    axes.plot(numbers, [m.kept_mass_p5 for m in measures], "v--", label="5th percentile")
    axes.plot(numbers, [m.kept_mass_min for m in measures], "x:", label="minimum")
    axes.axhline(report.min_kept_mass, color="red", linewidth=1, label="floor of the mean")
    least = min([report.min_kept_mass, *(m.kept_mass_min for m in measures)])
    axes.set_ylim(max(0.0, least - 0.05), 1.01)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)


def _over_time(axes: Axes, inspection: Inspection) -> None:
    patches = inspection.patches
    axes.set_title("attention mass of the frames over time (1: no more than chance)")
    axes.set_xlabel("seconds of the video")
    if not patches:
        axes.set_yticks([])
        _note(axes, "not measured")
        return
    times = [patch.time_s for patch in patches]
    steps = [after - before for before, after in pairwise(times)]
    edges = [*times, times[-1] + (median(steps) if steps else 1.0)]
    masses = [patch.mass for patch in patches]
    axes.stairs(masses, edges, fill=True, color="tab:blue", alpha=0.8)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.1 * max(*masses, 1.0)))


def _note(axes: Axes, text: str, colour: str = "dimgrey") -> None:
    axes.text(0.5, 0.5, text, color=colour, ha="center", va="center", transform=axes.transAxes)
