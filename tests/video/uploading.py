"""Calls of a video store that its tests make."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.video.records import VideoRecord
from prefill_service.video.store import VideoStore

OpenStore = Callable[..., VideoStore]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def create(store: VideoStore, data: bytes, **changes: object) -> VideoRecord:
    arguments = {"display_name": "v.mp4", "size_bytes": len(data), "sha256": digest(data)}
    return await store.create_upload(**{**arguments, **changes})


async def upload(store: VideoStore, data: bytes) -> VideoRecord:
    record = await create(store, data)
    await store.append_chunk(record.video_id, 0, data)
    return await store.finish_upload(record.video_id)


async def refused(reason: Reason, awaitable: Awaitable[object]) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await awaitable
    assert caught.value.reason is reason, caught.value
    return caught.value


def files_of(store: VideoStore, video_id: str) -> list[str]:
    folder = store._repository.videos_dir / video_id
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []
