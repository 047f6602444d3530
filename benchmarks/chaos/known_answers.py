"""Questions whose answers are known before anything is disturbed, and the comparison with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefill_client import Answer, Video
from prefill_client.aio import AsyncClient

from benchmarks.load.traffic import Film

MAX_TOKENS = 12
FRAMES: tuple[Mapping[str, Any], ...] = ({}, {"num_frames": 16}, {"fps": 1.0})
"""How a video is sampled: every way is a prefix of its own."""

FILLER = "the dog ran to the red house and then "


@dataclass(frozen=True, slots=True)
class Case:
    """A question about a film.

    Attributes:
        film: index of the film.
        messages: a text, or the turns of a chat.
        options: of ``ask``, beside ``max_tokens``.
        kind: for tables: ``exact``, ``sparse``, ``chat`` or ``long``.
    """

    film: int
    messages: str | tuple[Mapping[str, str], ...]
    options: Mapping[str, Any]
    kind: str

    def ask_options(self) -> dict[str, Any]:
        """Keyword arguments of ``ask``; the answer goes on to ``MAX_TOKENS``: more to compare."""
        return {"max_tokens": MAX_TOKENS, "ignore_eos": True, **self.options}

    def question(self) -> Any:
        """What ``ask`` takes as the question."""
        return self.messages if isinstance(self.messages, str) else list(self.messages)


def make_cases(films: Sequence[Film], questions: int, *, quality: str = "exact") -> list[Case]:
    """Every film sampled in every way, and of each one chat and one long question.

    Args:
        questions: asked about each prefix.
        quality: of attention, for all but those of kind ``sparse``.
    """
    cases = []
    for index, film in enumerate(films):
        for frames in FRAMES:
            options = {**frames, "quality": quality}
            for turn in range(questions):
                cases.append(Case(index, film.question(turn).text, options, "exact"))
        whole = {"quality": quality}
        first = film.question(0)
        second = film.question(1)
        chat = (
            {"role": "user", "content": first.text},
            {"role": "assistant", "content": first.answer},
            {"role": "user", "content": second.text},
        )
        cases.append(Case(index, chat, whole, "chat"))
        cases.append(Case(index, f"{FILLER * 200}. {second.text}", whole, "long"))
        cases.append(Case(index, first.text, {"quality": "balanced"}, "sparse"))
    return cases


@dataclass(slots=True)
class Comparison:
    """The answers expected, and what came.

    Attributes:
        expected: token ids of each case, in the cases' order.
        compared: answers that were compared, by kind of case.
        mismatches: what differed, in words.
    """

    cases: Sequence[Case]
    expected: list[tuple[int, ...]] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    mismatches: list[dict[str, Any]] = field(default_factory=list)

    async def learn(self, client: AsyncClient, videos: Sequence[Video]) -> None:
        """Ask every case once, undisturbed."""
        for case in self.cases:
            answer = await ask(client, videos[case.film], case)
            self.expected.append(answer.token_ids)

    def compare(self, number: int, answer: Answer) -> bool:
        """Whether an answer to case ``number`` is the one expected, token for token."""
        case = self.cases[number]
        self.compared[case.kind] = self.compared.get(case.kind, 0) + 1
        if answer.token_ids == self.expected[number]:
            return True
        self.mismatches.append(
            {
                "case": number,
                "kind": case.kind,
                "expected": list(self.expected[number]),
                "found": list(answer.token_ids),
                "job": answer.job_id,
            }
        )
        return False


async def ask(client: AsyncClient, video: Video | str, case: Case) -> Answer:
    """One question and its whole answer."""
    return await client.ask(video, case.question(), **case.ask_options()).result()
