"""Stage 2: the language model learns to read the features and to answer.

The vision tower stays as it is. Lengths grow: first a few short videos, then sketches of long
ones, then long ones themselves (see ``sketches``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tools.needle.sketches import Batch, Batches, predict
from tools.needle.stories import MIN_COUNTING, TASKS
from tools.needle.tower import batched, clips, feature_bank
from tools.needle.training import Log, Run, learning_rate, optimizer
from tools.tiny_tokenizer import END_OF_TURN

_TRAIN_SEED = 200_000
HELD_OUT_SEED = 700_000
_REPORT_EVERY = 50
_END_WEIGHT = 0.05


@dataclass(frozen=True, slots=True)
class Phase:
    """Some steps at some lengths.

    Attributes:
        steps: how many.
        rendered: (least, most) rendered patches of a video, log-uniform.
        seconds: (least, most) length; at least ``rendered``. Equal to it unless larger.
        patches: rendered patches of a step, over all its videos.
    """

    steps: int
    rendered: tuple[int, int]
    seconds: tuple[int, int]
    patches: int

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """Seconds, rendered patches and videos of one step."""
        rendered = _log_uniform(rng, *self.rendered)
        seconds = max(rendered, _log_uniform(rng, *self.seconds))
        return seconds, rendered, max(1, self.patches // rendered)


def parse_phases(text: str) -> tuple[Phase, ...]:
    """``steps:rendered:seconds:patches,...`` with ranges as ``16-64``.

    Raises:
        ValueError: anything else.
    """
    phases = []
    for part in text.split(","):
        fields = part.split(":")
        if len(fields) != 4:
            raise ValueError(f"phase {part!r} is not steps:rendered:seconds:patches")
        steps, rendered, seconds, patches = fields
        phases.append(
            Phase(
                steps=int(steps),
                rendered=_range(rendered),
                seconds=_range(seconds),
                patches=int(patches),
            )
        )
    return tuple(phases)


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    found = int(low), int(high or low)
    if not 2 <= found[0] <= found[1]:
        raise ValueError(f"{text!r} is no range of at least 2")
    return found


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return round(low * math.exp(rng.uniform(0, math.log(high / low)))) if high > low else low


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """Options of the stage; ``weights`` are those of ``TASKS``."""

    phases: tuple[Phase, ...]
    rate: float = 2e-3
    warm_up: int = 100
    clips: int = 160
    questions: int = 12
    weights: tuple[float, ...] = (0.2, 0.2, 0.25, 0.35)
    seed: int = 0
    name: str = "language"

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError(f"the phases end {step} steps before")


def held_out(model: Any, tokenizer: Any, count: int, *, seed: int, workers: int) -> Batches:
    """Batches from freshly rendered clips."""
    device = next(model.parameters()).device
    frames, labels = clips(count, seed, workers)
    with batched(model):
        return Batches(tokenizer, feature_bank(model, frames, device), labels, device)


def train(
    model: Any, tokenizer: Any, settings: LanguageSettings, *, out: Path, workers: int, log: Log
) -> None:
    """Train the language model in place; resumes from ``out / "<name>.pt"``."""
    named = list(model.model.language_model.named_parameters())
    run = Run(
        path=out / f"{settings.name}.pt",
        settings=asdict(settings),
        model=model,
        optimizer=optimizer(named),
        rng=np.random.default_rng(settings.seed),
    )
    run.resume()
    if run.step >= settings.steps:
        log(f"{settings.name}: {run.step} steps were done before")
        return
    batches = held_out(model, tokenizer, settings.clips, seed=_TRAIN_SEED, workers=workers)
    log(f"{settings.name}: {settings.clips} clips rendered; step {run.step}")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    counts = np.zeros((2, len(TASKS)))
    model.train()
    while run.step < settings.steps:
        seconds, rendered, videos = settings.phase(run.step).draw(run.rng)
        batch = batches.make(
            seconds,
            rendered,
            videos=videos,
            questions=settings.questions,
            rng=run.rng,
            weights=settings.weights,
        )
        logits, after = predict(model, batch)
        ends = torch.full_like(batch.answer, end)
        loss = cross_entropy(logits, batch.answer) + _END_WEIGHT * cross_entropy(after, ends)
        rate = learning_rate(run.step, settings.steps, settings.rate, settings.warm_up)
        run.update(loss, rate, [p for _, p in named])
        counts += _score(logits, batch)
        if run.step % _REPORT_EVERY == 0 or run.step == settings.steps:
            log(f"{settings.name} step {run.step} loss {loss.item():.3f} {_line(counts)}")
            counts[:] = 0
    run.save(now=True)


def _score(logits: torch.Tensor, batch: Batch) -> np.ndarray:
    """[2, tasks]: right answers, and answers."""
    right = (logits.argmax(-1) == batch.answer).cpu().numpy()
    task = batch.task.cpu().numpy()
    length = len(TASKS)
    return np.stack([np.bincount(task, right, length), np.bincount(task, minlength=length)])


def _line(counts: np.ndarray) -> str:
    shares = counts[0] / np.maximum(counts[1], 1)
    return " ".join(f"{task} {share:.3f}" for task, share in zip(TASKS, shares, strict=True))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of right answers by task, and the number of questions of each."""

    patches: int
    right: tuple[int, ...]
    asked: tuple[int, ...]

    def __str__(self) -> str:
        counts = np.array([self.right, self.asked])
        return f"{self.patches:5d} patches: {_line(counts)} ({min(self.asked)} questions or more)"


@torch.no_grad()
def evaluate(
    model: Any, batches: Batches, lengths: Sequence[int], *, per_task: int, seed: int
) -> list[Accuracy]:
    """Answer questions of unsketched videos, at least ``per_task`` of each task and length.

    Eight questions share a video, two of each task on average.

    Raises:
        ValueError: a length in which nothing appears twice, so that counting is no question.
    """
    if min(lengths) < MIN_COUNTING:
        raise ValueError(f"{min(lengths)} patches: a story with counts needs {MIN_COUNTING}")
    model.eval()
    found = []
    for patches in lengths:
        rng = np.random.default_rng((seed, patches))
        counts = np.zeros((2, len(TASKS)), int)
        while counts[1].min() < per_task:
            batch = batches.make(
                patches,
                patches,
                videos=max(1, min(32, 1024 // patches)),
                questions=8,
                rng=rng,
                weights=(1.0,) * len(TASKS),
            )
            counts += _score(predict(model, batch)[0], batch).astype(int)
        right, asked = counts.tolist()
        found.append(Accuracy(patches, tuple(right), tuple(asked)))
    return found
