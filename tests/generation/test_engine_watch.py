"""An engine that hangs is told from one that is slow, busy, idle or dead."""

from __future__ import annotations

import asyncio

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation import engine_watch
from prefill_service.generation.engine_watch import EngineWatch

LIMIT_S = 0.05


class Engine:
    """Makes its token when it is let go on; fails at once when it is dead."""

    def __init__(self) -> None:
        self.asked = 0
        self.goes_on = asyncio.Event()
        self.dead = False

    async def make_token(self, limit_s: float) -> None:
        self.asked += 1
        if self.dead:
            raise ServiceError(Reason.DECODER_UNAVAILABLE, "connection refused")
        try:
            await asyncio.wait_for(self.goes_on.wait(), limit_s)
        except TimeoutError:
            raise ServiceError(Reason.DECODER_UNAVAILABLE, f"no token in {limit_s} s") from None


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> EngineWatch:
    monkeypatch.setattr(engine_watch, "_SILENCE_S", 0.0)
    return EngineWatch(LIMIT_S)


async def polled(watch: EngineWatch, engine: Engine) -> str:
    """The trouble that is found, after twice the time in which a token must come."""
    end = asyncio.get_running_loop().time() + 2 * LIMIT_S
    while asyncio.get_running_loop().time() < end:
        if trouble := watch.find_trouble(engine.make_token):
            return trouble
        await asyncio.sleep(LIMIT_S / 10)
    return ""


async def test_an_engine_that_makes_no_token_hangs(watch: EngineWatch) -> None:
    engine = Engine()
    with watch.follow():
        assert await polled(watch, engine) == f"no token in {LIMIT_S} s"
    await watch.close()


async def test_nobody_waits_so_nobody_asks(watch: EngineWatch) -> None:
    engine = Engine()
    with watch.follow():
        pass
    assert await polled(watch, engine) == ""
    assert engine.asked == 0


async def test_an_engine_that_makes_its_token_works(watch: EngineWatch) -> None:
    engine = Engine()
    engine.goes_on.set()
    with watch.follow():
        assert await polled(watch, engine) == ""
    assert engine.asked > 1
    await watch.close()


async def test_an_engine_that_answers_somebody_is_busy(watch: EngineWatch) -> None:
    engine = Engine()
    with watch.follow(), watch.follow() as note_sign:
        trouble = asyncio.create_task(polled(watch, engine))
        while not trouble.done():
            await asyncio.sleep(LIMIT_S / 10)
            note_sign()
    assert trouble.result() == ""
    await watch.close()


async def test_a_dead_engine_is_not_called_a_hanging_one(watch: EngineWatch) -> None:
    engine = Engine()
    engine.dead = True
    with watch.follow():
        assert await polled(watch, engine) == ""
    assert engine.asked > 0
    await watch.close()
