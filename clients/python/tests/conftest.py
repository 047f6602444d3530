"""Fixtures of the client's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# pytest's importlib mode leaves the folder of the tests' helpers off the path.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "fakes"))

from client_helpers import Api, Cli, make_client, write_clip
from fake_prefill_server import FakeServer


@pytest.fixture(scope="session")
def shared_server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: FakeServer) -> FakeServer:
    shared_server.reset()
    return shared_server


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def api(kind: str, server: FakeServer) -> Any:
    client = make_client(kind, server.address)
    yield Api(client)
    if kind == "async":
        await client.close()
    else:
        client.close()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """What the fake server takes for a video; 1.5 MiB and a bit."""
    return write_clip(tmp_path / "clip.mp4", 1)


@pytest.fixture
def cli(server: FakeServer, tmp_path: Path) -> Cli:
    return Cli(server, tmp_path)
