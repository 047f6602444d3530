"""Uploads when the disk has no room."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prefill_service.errors import Reason
from prefill_service.video.records import VideoState
from tests.video.uploading import OpenStore, create, refused


async def test_disk_below_its_reserve_refuses_and_the_upload_goes_on_later(
    open_store: OpenStore, video: bytes
) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video[:100])
    await store.close()
    full = open_store(min_free_bytes=1 << 60)
    error = await refused(Reason.STORAGE_FULL, full.append_chunk(record.video_id, 100, video[100:]))
    assert error.metadata["min_free_bytes"] == str(1 << 60)
    await refused(Reason.STORAGE_FULL, create(full, video))
    assert (await full.get_video(record.video_id)).committed_bytes == 100
    await full.close()
    store = open_store()
    await store.append_chunk(record.video_id, 100, video[100:])
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


FILL = """
import asyncio, hashlib, resource, sys
from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import ServiceError
from prefill_service.video.store import VideoStore
async def main(folder, limit):
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    # A reserve below zero: the check of free space must not come before the real error.
    storage = StorageConfig(data_dir=folder, min_free_bytes=-(1 << 40))
    store = VideoStore.open(storage, VideoConfig())
    data = bytes(range(256)) * 2048
    made = await store.create_upload("v", 400_000, hashlib.sha256(data).hexdigest())
    offset, chunk = 0, data[:100_000]
    if not limit:
        (store._repository.videos_dir.parent / "ballast").write_bytes(bytes(700_000))
    try:
        for offset in range(0, 400_000, 100_000):
            await store.append_chunk(made.video_id, offset, chunk)
    except ServiceError as error:
        print(error.reason, offset, (await store.get_video(made.video_id)).committed_bytes)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        (store._repository.videos_dir.parent / "ballast").unlink()
    print(await store.append_chunk(made.video_id, offset, chunk))
    await store.close()
asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_write_that_fails_half_way_counts_for_nothing(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FILL, str(tmp_path), "250000"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout.split() == ["STORAGE_FULL", "200000", "200000", "300000"], done.stderr


def test_real_disk_full(tmp_path: Path) -> None:
    """A file system of 1 MiB in a mount namespace of its own."""
    namespace = [shutil.which("unshare") or "unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        pytest.skip("no unprivileged mount namespaces here")
    mount = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1" 0'
    command = [*namespace, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FILL]
    done = subprocess.run(command, capture_output=True, text=True)
    reason, offset, committed, resumed = done.stdout.split() or [done.stderr] * 4
    assert reason == "STORAGE_FULL", done.stderr
    assert offset == committed
    assert int(resumed) == int(committed) + 100_000
