"""Lets every client ask its questions at their times, and notes what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.load.traffic import Arrival, Film, Traffic

QUESTION_LIMIT_S = 900.0


@dataclass(slots=True)
class Reply:
    """An answer as it came.

    Attributes:
        first_s: ``time.monotonic`` of the first token.
        text: all of it.
        prompt_tokens: of the question with its video; 0 if the system does not tell.
        retries: times it was told to come again later.
        upload_s: until the system had the video, if it had to be sent.
    """

    first_s: float
    text: str
    prompt_tokens: int = 0
    retries: int = 0
    upload_s: float = 0.0


class Asker(Protocol):
    """A system that answers questions about video files."""

    async def ask(self, client: int, film: Film, question: str) -> Reply:
        """One question. Any exception means that it failed."""


@dataclass(slots=True)
class Record:
    """One question.

    Attributes:
        at_s: when it came up, seconds after the start.
        wait_s: from then to the first token, waiting for the client's own questions before
            included; ``None`` if it failed.
        done_s: when its answer was complete, seconds after the start.
        right: whether the answer is the true one.
        error: why it failed, or nothing.
    """

    at_s: float
    client: int
    film: int
    patches: int
    fresh: bool
    wait_s: float | None = None
    done_s: float = 0.0
    text: str = ""
    right: bool = False
    prompt_tokens: int = 0
    retries: int = 0
    upload_s: float = 0.0
    error: str = ""


async def drive(
    asker: Asker,
    traffic: Traffic,
    films: Sequence[Film],
    *,
    said: Callable[[Record], None] = lambda _: None,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> list[Record]:
    """All questions; a client asks one after the other, and late ones count from their time.

    Args:
        said: gets each record when it is complete.
        sleep: for tests.

    Returns:
        In order of arrival.
    """
    begin = time.monotonic()

    async def ask(arrival: Arrival) -> Record:
        film = films[arrival.film]
        question = film.question(arrival.turn)
        record = Record(
            at_s=arrival.at_s,
            client=arrival.client,
            film=arrival.film,
            patches=film.patches,
            fresh=arrival.fresh,
        )
        try:
            async with asyncio.timeout(QUESTION_LIMIT_S):
                reply = await asker.ask(arrival.client, film, question.text)
            record.wait_s = reply.first_s - begin - arrival.at_s
            record.text = reply.text.strip()
            record.prompt_tokens = reply.prompt_tokens
            record.retries = reply.retries
            record.upload_s = reply.upload_s
            record.right = record.text == question.answer
            if not record.text:
                raise ValueError("the answer is empty")
        except Exception as error:
            record.wait_s = None
            record.error = f"{type(error).__name__}: {error}"[:500]
        record.done_s = time.monotonic() - begin
        said(record)
        return record

    async def client(number: int) -> list[Record]:
        records = []
        for arrival in traffic.of_client(number):
            await sleep(max(0.0, begin + arrival.at_s - time.monotonic()))
            records.append(await ask(arrival))
        return records

    found = await asyncio.gather(*(client(number) for number in range(traffic.clients)))
    return sorted((r for records in found for r in records), key=lambda record: record.at_s)
