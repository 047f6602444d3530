"""Videos made to fool selection: does any quality fail where its verification is content?

A *silent failure* is an answer that differs from the exact prefill's while the floor of the
quality was met; *sure* counts those of them that exact gave with a lead over the next answer, the
others were toss-ups, and *sure_and_right* those that cost a right answer. Whether the model itself
is right about such a video is another matter, and is printed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tables
from benchmarks.quality.fidelity.scoring import Asked, Setting, filmed
from benchmarks.quality.fidelity.workers import reader, spread
from tools.needle import stories
from tools.needle.stories import COLORS, SHAPES, Needle, Question, Story
from tools.needle.videos import PLAIN, Look

PATCHES = 256
VIDEOS = 24
QUESTIONS_PER_TASK = 3
QUALITIES = ("exact", "high", "balanced", "fast")
_PATCHES_PER_SHARE = 32
"""Temporal patches of 15 to 16 tokens in a rank's share of a chunk of 512."""

Case = Callable[[np.random.Generator], tuple[Story, list[Question], Look]]


def _asked(story: Story, rng: np.random.Generator) -> list[Question]:
    return stories.distinct_questions(story, QUESTIONS_PER_TASK, rng)


def _within(places: Sequence[int], look: Look = PLAIN) -> Case:
    """Needles in some of the given patches."""

    def make(rng: np.random.Generator) -> tuple[Story, list[Question], Look]:
        story = stories.sample_story(PATCHES, rng, places)
        return story, _asked(story, rng), look

    return make


def _ends(rng: np.random.Generator) -> tuple[Story, list[Question], Look]:
    """One needle in the first patch, one in the last."""
    first, last = _pair(rng, 0, PATCHES - 1)
    return _about((first, last), PLAIN)


def _one_block(rng: np.random.Generator) -> tuple[Story, list[Question], Look]:
    """Two needles in neighbouring patches: one block of 64 keys holds both."""
    at = int(rng.integers(8, PATCHES - 8))
    return _about(_pair(rng, at, at + 1), PLAIN)


def _twice(rng: np.random.Generator) -> tuple[Story, list[Question], Look]:
    """A shape that comes twice, far apart, and is asked about twice."""
    first, second = sorted(int(p) for p in rng.choice(PATCHES, 2, replace=False))
    twice, other = _pair(rng, first, int(rng.integers(second)))
    if other.patches[0] == first:
        other = Needle(other.shape, other.color, (second - 1 if second - 1 != first else 0,))
    twice = Needle(twice.shape, twice.color, (first, second))
    story = Story(PATCHES, (twice, other), 1)
    questions = [
        stories.color_question(twice),
        stories.color_question(twice),
        stories.count_question(twice),
        stories.shape_question(twice),
    ]
    return story, questions, PLAIN


def _pair(rng: np.random.Generator, first: int, second: int) -> tuple[Needle, Needle]:
    shapes = rng.choice(SHAPES, 2, replace=False)
    colors = rng.choice(list(COLORS), 2, replace=False)
    return (
        Needle(str(shapes[0]), str(colors[0]), (first,)),
        Needle(str(shapes[1]), str(colors[1]), (second,)),
    )


def _about(pair: tuple[Needle, Needle], look: Look) -> tuple[Story, list[Question], Look]:
    one, other = pair
    questions = [
        ask(needle) for needle in pair for ask in (stories.color_question, stories.shape_question)
    ]
    questions += [stories.order_question(one, other), stories.order_question(other, one)]
    return Story(PATCHES, pair, 0), questions, look


def _borders(ranks: int) -> list[int]:
    """Patches on both sides of where a share (or, with every ``ranks``-th, a chunk) ends."""
    step = ranks * _PATCHES_PER_SHARE
    return [p for end in range(step, PATCHES, step) for p in (end - 1, end)]


EVERYWHERE = range(PATCHES)
CASES: dict[str, Case] = {
    "anywhere (for comparison)": _within(EVERYWHERE),
    "one frame only": _within(EVERYWHERE, Look(frames=1)),
    "like the background": _within(EVERYWHERE, Look(opacity=0.35)),
    "at rank borders": _within(_borders(1)),
    "at chunk borders of two ranks": _within(_borders(2)),
    "first and last patch": _ends,
    "two in one block": _one_block,
    "twice, and asked twice": _twice,
}


@dataclass(frozen=True, slots=True)
class Work:
    """One video of a case."""

    checkpoint: Path
    sparse_from: int
    case: str
    seed: int


def run(work: Work) -> list[Asked]:
    """In a worker."""
    number = list(CASES).index(work.case)
    story, questions, look = CASES[work.case](np.random.default_rng((work.seed, number)))
    settings = [Setting(quality, ranks) for quality in QUALITIES for ranks in (1, 2)]
    frames = filmed(story, work.seed, look)
    return reader(work.checkpoint, work.sparse_from).compare(
        frames, questions, settings, work.seed, measure_truth=False
    )


def rows(case: str, asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Per quality, ranks pooled."""
    found = []
    truth = {
        (one.setting.ranks, one.video): one.right for one in asked if one.setting.quality == "exact"
    }
    for quality in QUALITIES:
        members = [one for one in asked if one.setting.quality == quality]
        same = [flag for one in members for flag in one.same]
        silent = [
            (sure, sure and right)
            for one in members
            if one.floor_met
            for same, sure, right in zip(
                one.same, one.sure, truth[one.setting.ranks, one.video], strict=True
            )
            if not same
        ]
        found.append(
            {
                "case": case,
                "quality": quality,
                "answers": len(same),
                "right": round(float(np.mean([f for one in members for f in one.right])), 3),
                "as_exact": round(float(np.mean(same)), 3),
                "silent_failures": len(silent),
                "sure": sum(sure for sure, _ in silent),
                "sure_and_right": sum(right for _, right in silent),
                "density": round(float(np.mean([one.density or 1.0 for one in members])), 3),
            }
        )
    return found


def report(checkpoint: Path, sparse_from: int, seed: int, workers: int) -> list[dict[str, Any]]:
    """Run all cases, print the table, return its rows."""
    works = [
        Work(checkpoint=checkpoint, sparse_from=sparse_from, case=case, seed=seed * 1000 + index)
        for case in CASES
        for index in range(VIDEOS)
    ]
    answered = list(spread(run, works, workers))
    found = []
    for case in CASES:
        mine = [
            a for w, asked in zip(works, answered, strict=True) if w.case == case for a in asked
        ]
        found += rows(case, mine)
    names = list(found[0])
    print("\nvideos made to fool selection:")
    print(tables.markdown(names, [list(one.values()) for one in found]), flush=True)
    return found
