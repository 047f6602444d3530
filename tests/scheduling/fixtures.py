"""A data directory with one READY video, made once, copied for each service."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.video.store import VideoStore
from tests.scheduling.harness import serving


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("template") / "data"
    data = make_video(seconds=2).read_bytes()

    async def fill() -> str:
        store = VideoStore.open(StorageConfig(data_dir=str(folder)), VideoConfig())
        digest = hashlib.sha256(data).hexdigest()
        video = await store.create_upload("video.mp4", len(data), digest)
        await store.append_chunk(video.video_id, 0, data)
        await store.finish_upload(video.video_id)
        await store.close()
        return video.video_id

    return folder, asyncio.run(fill())


@pytest.fixture
def serve(tmp_path: Path, template: tuple[Path, str]) -> Callable[..., Any]:
    """``async with serve(engine={...}) as s``: a service on its own data directory."""
    return partial(serving, tmp_path / "data", template)
