"""What happens in a needle video, and questions about it with their answers.

The tasks follow VNBench (Zhao et al., 2024): *retrieval*, both ways (the colour of a shape, the
shape of a colour), *ordering* (which of two came first) and *counting* (how often one appeared).
A needle is a coloured shape that fills exactly one temporal patch: two frames, one second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
COLORS = {
    "red": (225, 30, 30),
    "green": (30, 190, 40),
    "blue": (40, 60, 235),
    "yellow": (240, 225, 30),
    "white": (250, 250, 250),
    "purple": (150, 30, 190),
    "orange": (245, 140, 15),
    "cyan": (20, 225, 225),
}
"""Name to RGB."""

TASKS = ("color", "shape", "order", "count")
MAX_COUNT = 5
MIN_PATCHES = 2
MIN_COUNTING = 8
"""Patches from which on a needle may come several times."""

_MANY = 16


@dataclass(frozen=True, slots=True)
class Needle:
    """A coloured shape and the temporal patches in which it is seen, ascending."""

    shape: str
    color: str
    patches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """A video of ``patches`` seconds. Shapes differ between its needles, and so do colours.

    Attributes:
        patches: temporal patches.
        needles: what appears.
        countable: how many of the first needles were given a random number of appearances; only
            of those is the number asked, only the others are put in order.
    """

    patches: int
    needles: tuple[Needle, ...]
    countable: int

    def events(self) -> list[Needle | None]:
        """Per temporal patch the needle that it shows."""
        shown: list[Needle | None] = [None] * self.patches
        for needle in self.needles:
            for patch in needle.patches:
                shown[patch] = needle
        return shown


@dataclass(frozen=True, slots=True)
class Question:
    """One question; the answer is a single word or digit."""

    task: str
    text: str
    answer: str


def sample_story(
    patches: int, rng: np.random.Generator, places: Sequence[int] | None = None
) -> Story:
    """Three to five needles (fewer in videos under eight patches), some appearing repeatedly.

    Args:
        patches: temporal patches of the video.
        rng: source of randomness.
        places: patches that may show a needle; all unless given.

    Raises:
        ValueError: fewer than two patches, or places.
    """
    free = np.arange(patches) if places is None else np.unique(np.asarray(places))
    if patches < MIN_PATCHES or len(free) < MIN_PATCHES:
        raise ValueError(f"{patches} patches with {len(free)} places: a story needs {MIN_PATCHES}")
    fewest, most = (3, 5) if len(free) >= MIN_COUNTING else (2, min(4, len(free)))
    kinds = int(rng.integers(fewest, most + 1))
    shapes = rng.permutation(len(SHAPES))[:kinds]
    colors = rng.permutation(len(COLORS))[:kinds]
    most = MAX_COUNT if len(free) >= _MANY else 3 if len(free) >= MIN_COUNTING else 1
    countable = 0 if most == 1 else 2 if kinds >= 4 and rng.random() < 0.5 else 1
    counts = [int(rng.integers(1, most + 1)) if i < countable else 1 for i in range(kinds)]
    while sum(counts) > len(free):
        counts[int(np.argmax(counts))] -= 1
    chosen = rng.permutation(free)[: sum(counts)]
    names = list(COLORS)
    needles = []
    start = 0
    for shape, color, count in zip(shapes, colors, counts, strict=True):
        at = tuple(sorted(int(p) for p in chosen[start : start + count]))
        needles.append(Needle(SHAPES[shape], names[color], at))
        start += count
    return Story(patches, tuple(needles), countable)


def color_question(needle: Needle) -> Question:
    """Retrieval: a shape's colour."""
    return Question("color", f"What color is the {needle.shape}?", needle.color)


def shape_question(needle: Needle) -> Question:
    """Retrieval the other way: a colour's shape."""
    return Question("shape", f"Which shape is {needle.color}?", needle.shape)


def order_question(first: Needle, second: Needle) -> Question:
    """Ordering of two needles, named in this order; by their first appearance."""
    earlier = first if first.patches[0] < second.patches[0] else second
    text = f"Which came first, the {first.shape} or the {second.shape}?"
    return Question("order", text, earlier.shape)


def count_question(needle: Needle) -> Question:
    """Counting of appearances."""
    text = f"How many times does the {needle.shape} appear?"
    return Question("count", text, str(len(needle.patches)))


def sample_questions(
    story: Story, count: int, rng: np.random.Generator, weights: Sequence[float] = (1, 1, 1, 1)
) -> list[Question]:
    """Questions of the story, with repetition; ``weights`` are those of ``TASKS``.

    What a story cannot be asked (counts where nothing repeats, the order of one) becomes a
    question of colour.
    """
    chances = np.asarray(weights, float) / sum(weights)
    once = story.needles[story.countable :]
    questions = []
    for task in rng.choice(TASKS, count, p=chances):
        if task == "count" and story.countable:
            questions.append(count_question(story.needles[rng.integers(story.countable)]))
        elif task == "order" and len(once) >= 2:
            first, second = rng.permutation(len(once))[:2]
            questions.append(order_question(once[first], once[second]))
        elif task == "shape":
            questions.append(shape_question(story.needles[rng.integers(len(story.needles))]))
        else:
            questions.append(color_question(story.needles[rng.integers(len(story.needles))]))
    return questions


def distinct_questions(story: Story, per_task: int, rng: np.random.Generator) -> list[Question]:
    """At most ``per_task`` different questions of each task, in the order of ``TASKS``."""
    once = story.needles[story.countable :]
    possible = (
        [color_question(needle) for needle in story.needles],
        [shape_question(needle) for needle in story.needles],
        [order_question(a, b) for a in once for b in once if a is not b],
        [count_question(needle) for needle in story.needles[: story.countable]],
    )
    return [
        questions[index]
        for questions in possible
        for index in rng.permutation(len(questions))[:per_task]
    ]
