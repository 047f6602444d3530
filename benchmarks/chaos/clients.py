"""Clients that go on asking while the service is disturbed, each answer compared."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefill_client import PrefillError, RetryPolicy, Video
from prefill_client.aio import AsyncClient

from benchmarks.chaos.known_answers import Comparison, ask
from benchmarks.load.traffic import Film

ANSWER_LIMIT_S = 600.0
ACTIONS = {"ask": 70, "upload": 20, "leave": 10}
"""What a client does next, in percent."""

LEAVE_TOKENS = 300
MOST_MESSAGES = 50


@dataclass(slots=True)
class Outcome:
    """What became of all calls.

    Attributes:
        disturbance: what is being done to the service, for the failures.
        done: calls that ended well, by action.
        failures: (disturbance, action, reason) to how often.
        messages: the first failures, in the service's words.
    """

    disturbance: str = ""
    done: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)

    def add_failure(self, action: str, error: BaseException) -> None:
        """Count a call that failed."""
        reason = error.reason if isinstance(error, PrefillError) else type(error).__name__
        self.failures[self.disturbance, action, reason] += 1
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(f"{self.disturbance}, {action}: {error}"[:400])


@dataclass(frozen=True, slots=True)
class Story:
    """What is asked about: the films, as files and as videos of the service, and the answers."""

    films: Sequence[Film]
    videos: Sequence[Video]
    comparison: Comparison


def film_copy(film: Film, rng: random.Random) -> bytes:
    """A film as a file that the service has not seen: its bytes differ, what it shows does not."""
    content = rng.randbytes(8)
    return film.path.read_bytes() + (8 + len(content)).to_bytes(4, "big") + b"free" + content


class SteadyClient:
    """One client with a connection of its own, as the SDK is used: with its own retries."""

    def __init__(self, address: str, story: Story, outcome: Outcome, seed: int) -> None:
        self._address = address
        self._story = story
        self._outcome = outcome
        self._rng = random.Random(seed)

    async def run(self, stop: asyncio.Event) -> None:
        """One action after the other until ``stop``."""
        async with AsyncClient(self._address) as client:
            while not stop.is_set():
                name = self._rng.choices(list(ACTIONS), weights=list(ACTIONS.values()))[0]
                number = self._rng.randrange(len(self._story.comparison.cases))
                try:
                    async with asyncio.timeout(ANSWER_LIMIT_S):
                        await getattr(self, f"_{name}")(client, number)
                    self._outcome.done[name] += 1
                except (PrefillError, TimeoutError) as error:
                    self._outcome.add_failure(name, error)
                await asyncio.sleep(self._rng.uniform(0.0, 0.2))

    async def _ask(self, client: AsyncClient, number: int) -> None:
        case = self._story.comparison.cases[number]
        answer = await ask(client, self._story.videos[case.film], case)
        self._story.comparison.compare(number, answer)

    async def _upload(self, client: AsyncClient, number: int) -> None:
        """A video of this client alone: sent, asked about and deleted."""
        case = self._story.comparison.cases[number]
        video = await client.upload(film_copy(self._story.films[case.film], self._rng))
        self._story.comparison.compare(number, await ask(client, video, case))
        await client.delete_video(video.video_id)

    async def _leave(self, client: AsyncClient, number: int) -> None:
        """A client that goes away while its answer is made."""
        case = self._story.comparison.cases[number]
        options: dict[str, Any] = {**case.ask_options(), "max_tokens": LEAVE_TOKENS}
        stream = client.ask(self._story.videos[case.film], case.question(), **options)
        asking = asyncio.create_task(stream.result())
        await asyncio.wait({asking}, timeout=self._rng.uniform(0.01, 1.0))
        stream.cancel()
        with suppress(asyncio.CancelledError):
            try:
                await asking
            except PrefillError as error:
                if error.reason != "CANCELLED":
                    raise


class Prober:
    """Asks a question that takes every part of the service, again and again until it is answered.

    A copy of the shortest film is sent, indexed, prefilled, asked about and deleted, without the
    SDK's own retries: the first answer says that everything works again.
    """

    def __init__(self, story: Story, outcome: Outcome, seed: int) -> None:
        self._story = story
        self._outcome = outcome
        self._rng = random.Random(seed)
        self._number = min(
            (number for number, case in enumerate(story.comparison.cases) if case.kind == "exact"),
            key=lambda number: story.films[story.comparison.cases[number].film].patches,
        )

    async def wait_answer(self, address: str, limit_s: float) -> None:
        """Return when a probe has been answered.

        Raises:
            TimeoutError: none was within ``limit_s``.
        """
        once = RetryPolicy(attempts=1)
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    async with AsyncClient(address, retry=once, upload_retry=once) as client:
                        await self._probe(client)
                        return
                except PrefillError:
                    await asyncio.sleep(0.1)

    async def _probe(self, client: AsyncClient) -> None:
        case = self._story.comparison.cases[self._number]
        video = await client.upload(film_copy(self._story.films[case.film], self._rng))
        self._story.comparison.compare(self._number, await ask(client, video, case))
        await client.delete_video(video.video_id)
