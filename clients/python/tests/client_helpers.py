"""What the tests share: both clients behind one face, files to upload, the command."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_backend import MAGIC
from fake_prefill_server import FakeServer

from prefill_client import AsyncClient, Client, RetryPolicy

FAST = RetryPolicy(attempts=5, initial_delay_s=0.02, max_delay_s=1.0, reconnect_s=0.0)
PREFILL = Path(sys.executable).with_name("prefill")


class Api:
    """One face for both clients: every method awaited, every iterator a list."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client
        self.is_async = isinstance(client, AsyncClient)

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = getattr(self.client, name)
        if self.is_async:
            return await method(*args, **kwargs)
        return await asyncio.to_thread(method, *args, **kwargs)

    async def answer(self, *args: Any, **kwargs: Any) -> Any:
        """The whole answer of ``ask``."""
        stream = self.client.ask(*args, **kwargs)
        if self.is_async:
            return await stream.result()
        return await asyncio.to_thread(stream.result)

    async def collect(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        return (await self.stream(getattr(self.client, name)(*args, **kwargs)))[0]

    async def stream(self, iterable: Any, limit: int | None = None) -> tuple[list[Any], Any]:
        """The first ``limit`` items and what ended the iteration, None if nothing did."""
        items: list[Any] = []
        if not self.is_async:
            return items, await asyncio.to_thread(self._drain, iterable, items, limit)
        async for item in iterable:
            items.append(item)
            if len(items) == limit:
                break
        return items, None

    def _drain(self, iterable: Any, items: list[Any], limit: int | None) -> None:
        for item in iterable:
            items.append(item)
            if len(items) == limit:
                return


def make_client(kind: str, address: str, **kwargs: Any) -> Any:
    kwargs = {"retry": FAST, "upload_retry": FAST, **kwargs}
    return (AsyncClient if kind == "async" else Client)(address, **kwargs)


def write_clip(path: Path, seed: int, size: int = 3 * (512 << 10) + 17) -> Path:
    path.write_bytes(MAGIC + bytes([seed]) * (size - len(MAGIC)))
    return path


class Cli:
    """Runs the installed ``prefill`` command."""

    def __init__(self, server: FakeServer, folder: Path) -> None:
        self.folder = folder
        self._address = server.address

    def start(self, *args: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PREFILL, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "PREFILL_ADDRESS": self._address},
            cwd=self.folder,
        )

    def run(self, *args: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        process = self.start(*args)
        out, err = process.communicate(stdin, timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        await asyncio.sleep(0.01)
