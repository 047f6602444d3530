"""The systems under load: the service with its client, and vLLM's OpenAI server alone."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp
from prefill_client import Video
from prefill_client.aio import AsyncClient
from prefill_client.errors import PrefillError
from typing_extensions import override

from benchmarks.load.drive import Asker, Reply
from benchmarks.load.traffic import Film
from benchmarks.service.systems import Setup
from benchmarks.service.vllm_alone import NAME, VllmServer
from tools.service_process import ServiceProcess

MAX_TOKENS = 4
START_S = 900.0
PATIENCE = 60
"""Times a question is asked again when the queue is full."""

_LATER = ("QUEUE_FULL", "KV_POOL_FULL")


class LoadedSystem(Asker, Protocol):
    """A system that is started, asked and stopped."""

    name: str
    arguments: Sequence[str]

    async def __aenter__(self) -> Self:
        """Start it; ready on return."""

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it and all its processes."""

    @property
    def pid(self) -> int:
        """Root of its processes."""


class Ours(LoadedSystem):
    """``prefill-service serve``; every client has a connection of its own.

    A client uploads a video when it first asks about one that it has not sent; what the server
    has already (by hash) is not sent again. When the queue is full it waits as it is told to, up
    to ``PATIENCE`` times.

    Args:
        pool_bytes: of KV pages, so that prefixes have to go.
    """

    name = "ours"

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        clients: int,
        *,
        cores: int,
        quality: str,
        pool_bytes: int,
    ) -> None:
        self._clients = clients
        self._quality = quality
        self.arguments = [
            "--model",
            str(checkpoint),
            "--ranks",
            str(cores),
            "--device",
            "cpu",
            "--engine-threads-per-rank",
            "1",
            "--engine-kv-pool-bytes",
            str(pool_bytes),
        ]
        data = ["--data-dir", str(folder / "data")]
        self._process = ServiceProcess([*self.arguments, *data], folder / "service.log")
        self._stack = AsyncExitStack()
        self._videos: dict[tuple[int, Path], Video] = {}

    async def __aenter__(self) -> Self:
        self._stack.enter_context(self._process)
        try:
            await asyncio.to_thread(self._process.wait_ready, START_S, lambda _: None)
            address = self._process.address
            self._connections = [
                await self._stack.enter_async_context(AsyncClient(address))
                for _ in range(self._clients)
            ]
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @override
    async def ask(self, client: int, film: Film, question: str) -> Reply:
        retries = 0
        while True:
            try:
                return await self._ask(client, film, question, retries)
            except PrefillError as error:
                retries += 1
                if error.reason not in _LATER or retries > PATIENCE:
                    raise
                await asyncio.sleep((error.retry_after_s or 1.0) * random.uniform(1.0, 1.5))

    async def _ask(self, client: int, film: Film, question: str, retries: int) -> Reply:
        connection = self._connections[client]
        start = time.monotonic()
        video = self._videos.get((client, film.path))
        if video is None:
            video = self._videos[client, film.path] = await connection.upload(film.path)
        upload_s = time.monotonic() - start
        stream = connection.ask(video, question, quality=self._quality, max_tokens=MAX_TOKENS)
        first_s = None
        async for _ in stream:
            first_s = first_s or time.monotonic()
        answer = await stream.result()
        tokens = answer.usage.prompt_tokens
        return Reply(
            first_s=first_s or time.monotonic(),
            text=answer.text,
            prompt_tokens=tokens,
            retries=retries,
            upload_s=upload_s,
        )


class VllmAlone(LoadedSystem):
    """vLLM's server with prefix caching and its cache of processed videos (its default).

    It reads the files in place, where the service has them sent.
    """

    name = "vllm"

    def __init__(self, checkpoint: Path, folder: Path, cores: int, longest: int) -> None:
        # The service's decoder may take as many requests at once, by vLLM's defaults.
        self._server = VllmServer(
            Setup(checkpoint=checkpoint, longest=longest, folder=folder, cores=cores)
        )
        self.arguments = self._server.arguments

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._server.__enter__)
        limit = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(self._server.url, timeout=limit)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()
        await asyncio.to_thread(self._server.__exit__, None, None, None)

    @property
    @override
    def pid(self) -> int:
        return self._server.pid

    @override
    async def ask(self, client: int, film: Film, question: str) -> Reply:
        content = [
            {"type": "video_url", "video_url": {"url": film.path.absolute().as_uri()}},
            {"type": "text", "text": question},
        ]
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
            return await _read(response.content)


async def _read(lines: Any) -> Reply:
    """Server-sent events of a chat completion; ``lines`` yields bytes."""
    first_s = None
    text = ""
    tokens = 0
    async for line in lines:
        data = line.decode().removeprefix("data: ").strip()
        if not data or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(str(event["error"])[:300])
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content")
            if piece:
                first_s = first_s or time.monotonic()
                text += piece
        if usage := event.get("usage"):
            tokens = int(usage.get("prompt_tokens", 0))
    if first_s is None:
        raise RuntimeError("the answer has no text")
    return Reply(first_s, text, tokens)
