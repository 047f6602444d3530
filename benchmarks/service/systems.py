"""What is compared, and what is measured of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from benchmarks.service.cases import Case

MAX_TOKENS = 8
"""Of each answer; they are compared between systems."""

PENALTY = 2.0
"""On tokens said before, prompt included. Random weights go on saying the word they like best; made
to name ever other ones, they show eight ranks of the logits."""

KV_BYTES = 2 << 30
"""KV space of vLLM, alone and in the service."""

START_S = 900.0


@dataclass(frozen=True, slots=True)
class Setup:
    """Where systems are started.

    Attributes:
        checkpoint: folder of the model.
        longest: tokens of the longest prompt.
        folder: scratch; logs go there.
        cores: how many may be used.
    """

    checkpoint: Path
    longest: int
    folder: Path
    cores: int


@dataclass(slots=True)
class Asked:
    """One question.

    Attributes:
        first_token_s: from asking to the first token.
        token_ids: of the answer.
        prompt_token_ids: as the system made them; ``None`` if it does not tell.
        cpu_s: CPU time of all the system's processes for the whole answer.
    """

    first_token_s: float
    token_ids: list[int]
    prompt_token_ids: list[int] | None = None
    cpu_s: float | None = None


@dataclass(slots=True)
class Measured:
    """One run of one system on one video that it has not seen before.

    Attributes:
        first, second: of two questions, one after the other; the second ``None`` if it was not
            asked.
        third_of_five_s: until three of five further questions, asked at once, have a first token;
            ``None`` if that was not asked.
        upload_s: until the system has the file; ``None`` where it reads it in place.
        stages: seconds by stage; which, depends on the system.
        density, kept_mass: of the attention.
        peak_bytes: proportional set size of all processes, at most.
    """

    first: Asked
    second: Asked | None
    third_of_five_s: float | None
    upload_s: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    density: float = 1.0
    kept_mass: float = 1.0
    peak_bytes: int = 0


class System(Protocol):
    """One way to have questions about videos answered, started and kept running."""

    name: str
    ranks: int
    modes: tuple[str, ...]
    cold_start_s: float

    def __enter__(self) -> Self:
        """Start it; ready on return."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it and all its processes."""

    @property
    def pid(self) -> int:
        """Root of its processes."""

    def measure(self, case: Case, mode: str) -> Measured:
        """Ask about a video. ``peak_bytes`` is left to the caller."""


def third_of(ask: Callable[[str], float], questions: Sequence[str]) -> float:
    """Ask all at once, one thread each; the third smallest of the times they return.

    Raises:
        Exception: the first that any of them raised.
    """
    times: list[float] = []
    errors: list[Exception] = []

    def one(question: str) -> None:
        try:
            times.append(ask(question))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sorted(times)[2]
