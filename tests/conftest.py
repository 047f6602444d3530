"""Fixtures every test may use, and an environment that does not depend on the machine."""

from __future__ import annotations

import os

# Before numpy or torch start their thread pools. Child processes inherit all of it.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_SERVER_DEV_MODE="1",  # POST /reset_prefix_cache
)

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from filelock import FileLock
from xdist.scheduler import LoadFileScheduling

from tests.support.unit_scheduling import UnitScheduling, dear_first
from tests.vllm_server import VllmServer
from tools.make_video import write_video

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "build" / "checkpoints"

cv2.setNumThreads(1)
# Tests that name a proxy do so themselves.
for proxy in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy"):
    os.environ.pop(proxy, None)
    os.environ.pop(proxy.upper(), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = dear_first((item.nodeid, item) for item in items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # by the number of tests, which says little
    return UnitScheduling(config, log)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Path]:
    """``checkpoint(family, seed=0, **overrides)``: a tiny checkpoint, built once per checkout.

    Overrides are the fields of ``tools.make_tiny_checkpoint.TinySpec``.
    """

    def get(family: str, **overrides: Any) -> Path:
        from tools.make_tiny_checkpoint import build

        name = family
        if overrides:
            key = json.dumps(overrides, sort_keys=True)
            name += "-" + hashlib.sha256(key.encode()).hexdigest()[:10]
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        with FileLock(CHECKPOINTS / f".{name}.lock"):
            return build(family, CHECKPOINTS / name, **overrides)

    return get


@pytest.fixture(scope="session")
def make_video(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_video(seconds=2, ..., suffix=".mp4")``: a video, written once per session.

    The arguments are those of ``tools.make_video.write_video``. Copy the file to change it.
    """
    folder = tmp_path_factory.mktemp("videos")

    def get(suffix: str = ".mp4", **arguments: Any) -> Path:
        key = json.dumps([suffix, arguments], sort_keys=True)
        path = folder / (hashlib.sha256(key.encode()).hexdigest()[:16] + suffix)
        return path if path.exists() else write_video(path, **arguments)

    return get


@pytest.fixture(scope="session")
def vllm(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], VllmServer]]:
    """``vllm(family)``: a running vLLM over the family's tiny checkpoint, one per session."""
    servers: dict[str, VllmServer] = {}

    def get(family: str) -> VllmServer:
        if family not in servers:
            folder = tmp_path_factory.mktemp(f"vllm-{family}")
            servers[family] = VllmServer(checkpoint(family), folder)
        return servers[family]

    yield get
    for server in servers.values():
        server.close()
