"""The parts of the long-question benchmark: texts of a given length, waits, and its table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.load import long_question
from tools.needle.stories import Question

NEEDLE = Path(__file__).resolve().parents[2] / "assets" / "needle-qwen3-vl"


def test_texts_have_their_number_of_tokens() -> None:
    texts = long_question._long_texts(NEEDLE, [100, 3000])
    tokenizer = AutoTokenizer.from_pretrained(NEEDLE)
    for tokens, text in texts.items():
        found = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert abs(found - tokens) <= 2


class Client:
    """Answers short questions at once, and the long one when three of them were asked beside it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.beside = asyncio.Event()

    def ask(self, video: object, text: str, **options: object) -> Any:
        client = self

        class Stream:
            async def result(self) -> Any:
                client.asked.append(text)
                if text == "long":
                    await client.beside.wait()
                elif "long" in client.asked and client.asked.count("short") == 23:
                    client.beside.set()
                await asyncio.sleep(0)
                usage = type("Usage", (), {"prompt_tokens": 9})
                return type("Answer", (), {"usage": usage})

        return Stream()


async def test_short_questions_are_asked_until_the_long_one_is_answered() -> None:
    film = type("Film", (), {"question": lambda self, turn: Question("kind", "short", "yes")})()
    asker = long_question.Asker(Client(), None, film)  # type: ignore[arg-type]
    row = await long_question._beside(asker, 9, "long", 60.0)
    assert row["failed"] == []
    assert row["beside"] >= 3
    assert row["prompt_tokens"] == 9
    assert row["p95_ratio"] == pytest.approx(row["p95_s"] / row["idle_p95_s"])
    assert "| ranks | 9 " in long_question.table([{"way": "ranks", **row}])
