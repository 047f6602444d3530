"""Which prefills fit the time: estimated before, corrected by what they took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.prefill.runs import DENSE
from benchmarks.gpu.prefill.shapes import PublishedModel

LINEAR_SHARE = 0.5
ATTENTION_SHARE = 0.4
SPARSE_SHARE = 0.5
"""Guesses before the first measurement: of the matmul peak that linear layers and dense attention
reach, and of dense attention's time that sparse attention takes."""
GENERATED_TOKENS_PER_S = 1e6
"""Inputs of all heads; a guess, too."""
OVERHEAD_S = 0.5


@dataclass(frozen=True, slots=True)
class Cell:
    """One prefill to measure.

    Attributes:
        video_tokens: asked for; the plan rounds them to whole patches.
        layers: of the model that is run.
    """

    shape: PublishedModel
    video_tokens: int
    mode: str
    layers: int

    def estimate_s(self, peak: float) -> float:
        """Seconds by rule of thumb."""
        tokens = self.video_tokens
        shape = self.shape
        linear = shape.linear_flops(tokens, self.layers) / (LINEAR_SHARE * peak)
        pairs = tokens * tokens / 2 * (self.layers - 1)
        attention = shape.attention_flops(pairs) / (ATTENTION_SHARE * peak)
        if self.mode not in (DENSE, "exact"):
            attention *= SPARSE_SHARE
        return linear + attention + OVERHEAD_S


Group = tuple[PublishedModel, int]
"""The cells that share inputs: a model and a length."""


def plan_cells(
    shapes: Sequence[PublishedModel], tokens: Iterable[int], modes: Sequence[str], layers: int
) -> dict[Group, list[Cell]]:
    """Shortest lengths first, so that running out of time costs the longest ones."""
    return {
        (shape, count): [
            Cell(shape=shape, video_tokens=count, mode=mode, layers=min(layers, shape.layers))
            for mode in modes
        ]
        for count in sorted(tokens)
        for shape in shapes
    }


class Budget:
    """Seconds left, and how wrong the estimates were so far.

    Args:
        seconds: in all.
        peak: FLOP/s of matrix products.
    """

    def __init__(self, seconds: float, peak: float) -> None:
        self._left = seconds
        self._peak = peak
        self._estimated = self._taken = 0.0
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self._left

    def spend(self, seconds: float) -> None:
        """Note what anything took."""
        self._left -= seconds

    def measured(self, cell: Cell, seconds: float) -> None:
        """Note what a cell's prefill took, which corrects the estimates; see ``spend``, too."""
        self._estimated += cell.estimate_s(self._peak)
        self._taken += seconds

    def predict(self, cells: Iterable[Cell]) -> float:
        """Seconds for some cells and their inputs."""
        cells = list(cells)
        # Not below a half of the estimate: short prefills say little about long ones.
        factor = max(0.5, self._taken / self._estimated) if self._estimated else 1.0
        inputs = max((cell.video_tokens for cell in cells), default=0) / GENERATED_TOKENS_PER_S
        return inputs + factor * sum(cell.estimate_s(self._peak) for cell in cells)

    def allows(self, what: str, cells: Iterable[Cell]) -> bool:
        """Whether there is time; if not, that is noted."""
        predicted = self.predict(cells)
        if predicted <= self._left:
            return True
        self.skipped.append(f"{what}: about {predicted:.0f} s, {self._left:.0f} s were left")
        return False
