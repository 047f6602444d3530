"""What a calibration prints: per layer before and after, and what it did in all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prefill_service.calibration.measure import Measured

_HEADS = ("layer", "worst kept mass", "mean kept mass", "density", "epsilon", "sensitivity")


def table(
    before: Measured, after: Measured, epsilons: np.ndarray, sensitivity: Sequence[float]
) -> str:
    """Lines of text.

    Args:
        before, after: with the uniform epsilon, and with the budgets.
        epsilons: [layers, kv_heads] the budgets.
        sensitivity: [layers], or empty.
    """
    rows = [_HEADS, *_layers(before, after, epsilons, sensitivity)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([
        *lines,
        f"worst head's kept mass {_change(before.worst, after.worst, 4)}, "
        f"mean {_change(before.kept_mass.mean(), after.kept_mass.mean(), 4)}, "
        f"attended keys {after.total / before.total:.4f} of before",
    ])  # fmt: skip


def _layers(
    before: Measured, after: Measured, epsilons: np.ndarray, sensitivity: Sequence[float]
) -> Iterator[tuple[str, ...]]:
    for layer, row in enumerate(epsilons):
        mass = before.kept_mass[layer], after.kept_mass[layer]
        yield (
            str(layer),
            _change(mass[0].min(), mass[1].min()),
            _change(mass[0].mean(), mass[1].mean()),
            _change(before.density[layer].mean(), after.density[layer].mean()),
            f"{row.min():.3f} to {row.max():.3f}",
            f"{sensitivity[layer]:.4f}" if len(sensitivity) else "-",
        )


def _change(before: float, after: float, digits: int = 3) -> str:
    return f"{before:.{digits}f} -> {after:.{digits}f}"
