"""Fresh videos for the table, one per unit of work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.fidelity.scoring import Asked, Setting, fresh_video
from benchmarks.quality.fidelity.workers import reader

TRUTH_UP_TO = 256
"""Temporal patches up to which all rows are attended exactly as well."""


@dataclass(frozen=True, slots=True)
class Work:
    """One video, prefilled and asked under every setting."""

    checkpoint: Path
    sparse_from: int
    patches: int
    questions: int
    seed: int
    settings: tuple[Setting, ...]


def run(work: Work) -> list[Asked]:
    """In a worker."""
    frames, questions = fresh_video(work.patches, work.questions, work.seed)
    return reader(work.checkpoint, work.sparse_from).compare(
        frames, questions, work.settings, work.seed, measure_truth=work.patches <= TRUTH_UP_TO
    )
