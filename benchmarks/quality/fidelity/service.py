"""The same questions to the whole service, and to vLLM alone on the same frames."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prefill_client import Client

from benchmarks.quality.fidelity import results
from benchmarks.quality.fidelity.scoring import Setting
from tools.needle import stories, videos
from tools.needle.stories import Question
from tools.service_process import ServiceProcess
from tools.vllm_alone import Question as AloneQuestion
from tools.vllm_alone import answer

_MAX_TOKENS = 4
_START_S = 600.0


def film(folder: Path, patches: Sequence[int], questions: int, seed: int) -> list[Film]:
    """One video per length, with questions of each task, as files."""
    films = []
    for number, length in enumerate(patches):
        rng = np.random.default_rng((seed, number, length))
        story = stories.sample_story(length, rng)
        path = videos.write_mp4(folder / f"{number}-{length}.mp4", story, seed + number)
        films.append(Film(path, length, stories.distinct_questions(story, questions, rng)))
    return films


class Film:
    """A video file and what is asked of it."""

    def __init__(self, path: Path, patches: int, questions: list[Question]) -> None:
        self.path = path
        self.patches = patches
        self.questions = questions


def measure(
    checkpoint: Path,
    patches: Sequence[int],
    questions: int,
    *,
    qualities: Sequence[str],
    seed: int,
    sparse_from: int,
    log: Path,
) -> tuple[list[dict[str, Any]], int]:
    """Rows of the service and of vLLM alone; and how many exact answers differ from vLLM's.

    Answers are compared token for token, up to the end of the turn.
    """
    with tempfile.TemporaryDirectory(prefix="fidelity-") as name:
        folder = Path(name)
        films = film(folder, patches, questions, seed)
        served, measures = _served(
            checkpoint, films, qualities, sparse_from=sparse_from, folder=folder, log=log
        )
        alone = [
            AloneQuestion(str(one.path), [("user", question.text)], _MAX_TOKENS)
            for one in films
            for question in one.questions
        ]
        references = answer(checkpoint, alone)
    asked = [question for one in films for question in one.questions]
    vllm = [(reference.token_ids, reference.text.strip()) for reference in references]
    differing = sum(a[0] != b[0] for a, b in zip(served["exact"], vllm, strict=True))
    rows = []
    for where, quality, found in [
        ("vllm alone", "exact", vllm),
        *(("service", quality, served[quality]) for quality in qualities),
    ]:
        right = _right(found, asked)
        same = [a[0] == b[0] for a, b in zip(found, served["exact"], strict=True)]
        rows.append(
            results.row(
                where,
                results.ALL,
                max(patches),
                setting=Setting(quality, 2 if where == "service" else 1),
                judged=results.Judged(right, _right(served["exact"], asked), same),
                measures=measures.get(quality, {}) if where == "service" else {},
            )
            | {"temporal_patches": list(patches)}
        )
    return rows, differing


def _right(found: Sequence[tuple[list[int], str]], asked: Sequence[Question]) -> list[bool]:
    return [text == question.answer for (_, text), question in zip(found, asked, strict=True)]


def _served(
    checkpoint: Path,
    films: Sequence[Film],
    qualities: Sequence[str],
    *,
    sparse_from: int,
    folder: Path,
    log: Path,
) -> tuple[dict[str, list[tuple[list[int], str]]], dict[str, dict[str, float | None]]]:
    """Per quality (token ids, text) of every answer; and mean density and kept mass."""
    arguments = ["--model", str(checkpoint), "--ranks", "2", "--device", "cpu"]
    arguments += ["--engine-sparse-from-tokens", str(sparse_from)]
    found: dict[str, list[tuple[list[int], str]]] = {quality: [] for quality in qualities}
    totals: dict[str, list[Any]] = {quality: [] for quality in qualities}
    with ServiceProcess([*arguments, "--data-dir", str(folder / "data")], log) as service:
        service.wait_ready(_START_S, lambda _: None)
        with Client(service.address) as client:
            for one in films:
                video = client.upload(one.path)
                for quality in qualities:
                    for question in one.questions:
                        stream = client.ask(
                            video, question.text, quality=quality, max_tokens=_MAX_TOKENS
                        )
                        answered = stream.result()
                        found[quality].append((list(answered.token_ids), answered.text.strip()))
                    job = client.job(answered.job_id)
                    if job.result and job.result.attention:
                        totals[quality].append(job.result.attention.total)
    measures: dict[str, dict[str, float | None]] = {
        quality: {
            "kept_mass": None,
            "kept_mass_certified": float(np.mean([t.kept_mass_mean for t in those])),
            "density": float(np.mean([t.density for t in those])),
        }
        for quality, those in totals.items()
        if those
    }
    return found, measures
