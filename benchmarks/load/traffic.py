"""Who asks what, when: Poisson arrivals of questions about videos, new ones and known ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from tools.needle import stories, videos
from tools.needle.stories import Question
from tools.needle.videos import SAMPLED_FPS, SIDE

LENGTHS: Mapping[int, float] = {16: 0.25, 32: 0.2, 64: 0.2, 128: 0.15, 256: 0.12, 384: 0.08}
"""Temporal patches (seconds of video) of a new video to its share. vLLM's loader takes 768 frames
at most, two to a patch."""

PER_TASK = 4
"""Different questions of each kind about a video, while there are so many."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A question that somebody has.

    Attributes:
        at_s: seconds after the start.
        client: who.
        film: index of the video.
        turn: how many questions about the video came before.
    """

    at_s: float
    client: int
    film: int
    turn: int

    @property
    def fresh(self) -> bool:
        """The first one about its video."""
        return self.turn == 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Everything that is asked. ``patches`` are the videos' lengths."""

    arrivals: tuple[Arrival, ...]
    patches: tuple[int, ...]
    clients: int

    def of_client(self, client: int) -> list[Arrival]:
        """In order of time."""
        return [arrival for arrival in self.arrivals if arrival.client == client]


def plan_traffic(
    seconds: float,
    clients: int,
    per_minute: float,
    *,
    seed: int,
    known_share: float = 0.5,
    lengths: Mapping[int, float] = LENGTHS,
) -> Traffic:
    """Arrivals of all clients together are a Poisson process; equal arguments give equal traffic.

    Args:
        seconds: no question comes later.
        per_minute: questions, on average.
        known_share: of the questions, those about a video that was asked about before.

    Raises:
        ValueError: a duration, rate or number of clients that is not positive, or a share that is
            none; the message names it.
    """
    for name, value in (("seconds", seconds), ("clients", clients), ("rate", per_minute)):
        if not value > 0:
            raise ValueError(f"{name} = {value!r} is not accepted; expected more than 0")
    if not 0 <= known_share < 1:
        raise ValueError(f"known share = {known_share!r} is not accepted; expected 0 to below 1")
    rng = np.random.default_rng((seed, 1))
    shares = np.array(list(lengths.values()))
    at_s = 0.0
    found: list[Arrival] = []
    patches: list[int] = []
    turns: list[int] = []
    while True:
        at_s += float(rng.exponential(60 / per_minute))
        if at_s >= seconds:
            return Traffic(tuple(found), tuple(patches), clients)
        if patches and rng.random() < known_share:
            film = int(rng.integers(len(patches)))
        else:
            film = len(patches)
            patches.append(int(rng.choice(list(lengths), p=shares / shares.sum())))
            turns.append(0)
        found.append(
            Arrival(at_s=at_s, client=int(rng.integers(clients)), film=film, turn=turns[film])
        )
        turns[film] += 1


@dataclass(frozen=True, slots=True)
class Film:
    """A video file and questions about it with known answers."""

    path: Path
    patches: int
    questions: Sequence[Question]

    def question(self, turn: int) -> Question:
        """The one that is asked after ``turn`` others; they come again when all were asked."""
        return self.questions[turn % len(self.questions)]


def make_films(patches: Sequence[int], folder: Path, seed: int, side: int = SIDE) -> list[Film]:
    """Write the videos, each with needles of its own, ``side`` pixels wide and high."""
    films = []
    for number, length in enumerate(patches):
        rng = np.random.default_rng((seed, 2, number))
        story = stories.sample_story(length, rng)
        frames = videos.render(story, np.random.default_rng((seed, 3, number)))
        path = _write(folder / f"{number}-{length}.mp4", frames, side)
        questions = stories.distinct_questions(story, PER_TASK, rng)
        order = rng.permutation(len(questions))
        films.append(Film(path, length, [questions[i] for i in order]))
    return films


def _write(path: Path, frames: Iterable[np.ndarray], side: int) -> Path:
    """RGB frames as an mp4, scaled.

    Raises:
        RuntimeError: OpenCV cannot write it.
    """
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), SAMPLED_FPS, (side, side))
    try:
        if not writer.isOpened():
            raise RuntimeError(f"OpenCV cannot write {path}")
        for frame in frames:
            writer.write(cv2.resize(frame, (side, side))[..., ::-1])
    finally:
        writer.release()
    return path
