"""How long vLLM may be silent, against a real server that is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import GenerationRequest, Sampling, VllmClient
from prefill_service.kv.handoff import HandoffParams
from prefill_service.kv.manifest import ShardRun
from prefill_service.models.prefix_plan import FrameSampling
from tests.kv.rank_process import make_manifest
from tests.support.simulated_backends import LAYOUT, SimulatedPlanner

SILENCE_S = 0.05
TOKEN = {"choices": [{"text": "yes", "token_ids": [1]}]}
END = {
    "choices": [{"finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


class Silent:
    """A server that answers when it may."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.rest = asyncio.Event()
        self.requests = 0

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        response = web.StreamResponse()
        await response.prepare(request)
        await self.first.wait()
        await response.write(f"data: {json.dumps(TOKEN)}\n\n".encode())
        await self.rest.wait()
        await response.write(f"data: {json.dumps(END)}\n\n".encode())
        return response


@asynccontextmanager
async def serving(silent: Silent) -> AsyncIterator[VllmClient]:
    application = web.Application()
    application.router.add_post("/inference/v1/generate", silent.generate)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as session:
        yield VllmClient(session, f"http://127.0.0.1:{port}", SILENCE_S)
    silent.first.set()
    silent.rest.set()
    await runner.cleanup()


def request(last_sign: Callable[[], float]) -> GenerationRequest:
    index = SimpleNamespace(frame_count=8, warnings=())
    plan = SimulatedPlanner().plan(index, "sha256", FrameSampling(), "")  # type: ignore[arg-type]
    manifest = make_manifest(LAYOUT, (ShardRun(0, 128, 0, 0),), [""])
    return GenerationRequest(
        token_ids=[1, 2, 3],
        plan=plan,
        handoff=HandoffParams(manifest, "lease", ""),
        sampling=Sampling(),
        request_id="r",
        last_sign=last_sign,
    )


async def test_a_silent_vllm_is_given_up() -> None:
    silent = Silent()
    async with serving(silent) as client:
        with pytest.raises(ServiceError, match=r"silent for 0\.05 s.*request_timeout_s") as caught:
            async for _ in client.generate(request(lambda: 0.0)):
                pass
    assert caught.value.reason is Reason.DECODER_UNAVAILABLE


async def test_work_on_the_prompt_is_a_sign_of_life() -> None:
    silent = Silent()
    silent.rest.set()
    asked = 0

    def last_sign() -> float:
        nonlocal asked
        asked += 1
        if asked == 3:  # the silence has lasted for three times the limit
            silent.first.set()
        return time.monotonic()

    async with serving(silent) as client:
        events = [event async for event in client.generate(request(last_sign))]
    assert [event.text for event in events] == ["yes", ""]
    assert asked == 3
    assert silent.requests == 1


async def test_once_tokens_come_only_tokens_count() -> None:
    silent = Silent()
    silent.first.set()
    async with serving(silent) as client:
        with pytest.raises(ServiceError, match="silent"):
            async for _ in client.generate(request(time.monotonic)):
                pass
