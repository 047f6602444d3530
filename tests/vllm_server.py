"""One embedded vLLM per model and test session, in an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from prefill_service.config import VllmConfig
from prefill_service.generation.server import GenerationServer

T = TypeVar("T")


class VllmServer:
    """A ``GenerationServer`` that outlives single tests; they reach it by ``url`` or ``run``."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.decoder = GenerationServer(VllmConfig(), str(model), "float32", folder)
        self.run(self.decoder.start())
        self._key_file = folder / "vllm-key"
        self._key_file.write_text(self.decoder.headers["Authorization"].removeprefix("Bearer "))

    @property
    def config(self) -> VllmConfig:
        """How a service in this process uses this vLLM."""
        return VllmConfig(url=self.url, api_key_file=str(self._key_file))

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of ``serve`` that make a service use this vLLM."""
        return ("--vllm-url", self.url, "--vllm-api-key-file", str(self._key_file))

    @property
    def url(self) -> str:
        return self.decoder.url

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(300)

    def close(self) -> None:
        self.run(self.decoder.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
