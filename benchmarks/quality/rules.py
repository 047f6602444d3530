"""Rules that turn a tile's block scores into a set of kept blocks; all tiles at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.quality.estimators import Estimate

OCTAVES = 16
"""Scores smaller than the tile's best by more than this count as equal."""


@dataclass(frozen=True, slots=True)
class Scores:
    """An estimator's view of many tiles, padded to the longest.

    Attributes:
        score, mass: [tiles, blocks]; 0 where the tile has no such block.
        present: [tiles, blocks] bool.
        forced: [tiles, blocks] bool, kept whatever the score: the first ``sinks`` blocks.
    """

    score: Tensor
    mass: Tensor
    present: Tensor
    forced: Tensor


def stack(estimates: list[Estimate], sinks: int) -> Scores:
    """Pad and stack."""
    pad = torch.nn.utils.rnn.pad_sequence
    score = pad([estimate.score for estimate in estimates], batch_first=True)
    mass = pad([estimate.mass for estimate in estimates], batch_first=True)
    blocks = torch.tensor([len(estimate.score) for estimate in estimates])
    index = torch.arange(score.shape[1])
    present = index < blocks[:, None]
    return Scores(score=score, mass=mass, present=present, forced=present & (index < sinks))


def fixed_budget(scores: Scores, share: float) -> Tensor:
    """The best ``share`` of each tile's blocks (Stem, Spava)."""
    wanted = (scores.present.sum(1, keepdim=True) * share).round()
    ranked = scores.score.masked_fill(scores.forced, torch.inf)
    rank = ranked.masked_fill(~scores.present, -1).argsort(1, descending=True).argsort(1)
    return scores.forced | (rank < wanted) & scores.present


def max_relative(scores: Scores, alpha: float) -> Tensor:
    """Blocks that score at least ``alpha`` times the tile's best (FlashPrefill)."""
    free = scores.score.masked_fill(scores.forced, 0)
    return scores.forced | (free >= alpha * free.amax(1, keepdim=True)) & scores.present


def top_p(scores: Scores, share: float) -> Tensor:
    """The fewest blocks whose estimated mass, with the local region's, reaches ``share``."""
    ranked = scores.score.masked_fill(scores.forced, torch.inf)
    order = ranked.masked_fill(~scores.present, -1).argsort(1, descending=True)
    mass = scores.mass.gather(1, order)
    local = 1 - scores.mass.sum(1, keepdim=True)
    before = local + mass.cumsum(1) - mass
    keep = torch.zeros_like(scores.present).scatter(1, order, before < share)
    return scores.forced | keep & scores.present


def loss_budget(scores: Scores, epsilon: float, levels_per_octave: int) -> Tensor:
    """Ours: a threshold relative to the best, lowered until at most ``epsilon`` is dropped.

    The threshold moves in steps, so that a histogram does instead of a sort: all blocks of a
    level are kept or none. The last level holds everything smaller.
    """
    levels = OCTAVES * levels_per_octave
    free = scores.score.masked_fill(scores.forced, 0)
    relative = free / free.amax(1, keepdim=True).clamp(min=1e-38)
    level = torch.floor(-levels_per_octave * torch.log2(relative)).clamp(0, levels - 1).long()
    per_level = torch.zeros(len(free), levels).scatter_add(1, level, free)
    below = per_level.flip(1).cumsum(1).flip(1)  # loss of this level and everything smaller
    dropped = (below <= epsilon).gather(1, level)
    return scores.forced | ~dropped & scores.present


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and its parameter as a function of a setting from 0 (dense) to 1 (sparse)."""

    keep: Callable[[Scores, float], Tensor]
    parameter: Callable[[float], float]

    def match(self, scores: Scores, density: float) -> tuple[float, Tensor]:
        """The parameter that keeps a share ``density`` of all blocks, and what it keeps.

        One value for all tiles: how a rule spreads its budget over them is part of it. The
        density reached is the smallest one not below the wanted one.
        """
        wanted = density * float(scores.present.sum())
        low = 0.0
        high = 1.0
        for _ in range(40):
            middle = (low + high) / 2
            if float(self.keep(scores, self.parameter(middle)).sum()) >= wanted:
                low = middle
            else:
                high = middle
        return self.parameter(low), self.keep(scores, self.parameter(low))


LOSS_BUDGET = "loss budget, 16 levels per octave"
RULES = {
    "fixed budget": Rule(fixed_budget, lambda setting: 1 - setting),
    "max-relative": Rule(max_relative, lambda setting: 2.0 ** (-60 * (1 - setting))),
    "top-p": Rule(top_p, lambda setting: 1 - setting),
    **{
        f"loss budget, {levels} levels per octave": Rule(
            partial(loss_budget, levels_per_octave=levels),
            lambda setting: 2.0 ** (-40 + 44 * setting),
        )
        for levels in (2, 16)
    },
}
