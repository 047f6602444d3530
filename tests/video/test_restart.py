"""A data folder after restarts, kills, power cuts and other services."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.uploading import OpenStore, create, refused, upload


async def test_upload_goes_on_after_a_restart(open_store: OpenStore, video: bytes) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video[:1234])
    await store.close()
    store = open_store()
    assert (await store.get_video(record.video_id)).committed_bytes == 1234
    await store.append_chunk(record.video_id, 1234, video[1234:])
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_committed_size_is_the_file_length(open_store: OpenStore, video: bytes) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video[:2000])
    os.truncate(store._repository.input_path(record.video_id), 1500)  # what a power cut may leave
    assert (await store.get_video(record.video_id)).committed_bytes == 1500
    await store.append_chunk(record.video_id, 1500, video[1500:])
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_interrupted_probe_can_be_finished_after_a_restart(
    open_store: OpenStore, video: bytes
) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append_chunk(record.video_id, 0, video)
    finishing = asyncio.create_task(store.finish_upload(record.video_id))
    while (await store.get_video(record.video_id)).state is not VideoState.PROBING:
        await asyncio.sleep(0.01)
    await store.close()
    await refused(Reason.CANCELLED, finishing)
    store = open_store()
    assert (await store.get_video(record.video_id)).state is VideoState.UPLOADING
    assert (await store.finish_upload(record.video_id)).state is VideoState.READY


async def test_killed_service_loses_nothing(tmp_path: Path, video: bytes) -> None:
    """A real process, killed while it probes."""
    script = """
import asyncio, hashlib, os, signal, sys
from pathlib import Path
from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.video.store import VideoStore
async def main():
    data = Path(sys.argv[2]).read_bytes()
    store = VideoStore.open(StorageConfig(data_dir=sys.argv[1], min_free_bytes=0), VideoConfig())
    made = await store.create_upload("v", len(data), hashlib.sha256(data).hexdigest())
    await store.append_chunk(made.video_id, 0, data)
    asyncio.create_task(store.finish_upload(made.video_id))
    while (await store.get_video(made.video_id)).state != "PROBING":
        await asyncio.sleep(0.005)
    print(made.video_id, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    (tmp_path / "v.mp4").write_bytes(video)
    arguments = [sys.executable, "-c", script, tmp_path / "data", tmp_path / "v.mp4"]
    killed = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    video_id = killed.stdout.strip()
    store = VideoStore.open(StorageConfig(data_dir=str(tmp_path / "data")), VideoConfig())
    record = await store.get_video(video_id)
    assert (record.state, record.committed_bytes) == (VideoState.UPLOADING, len(video))
    assert (await store.finish_upload(video_id)).state is VideoState.READY
    await store.close()


async def test_folder_is_for_one_process(open_store: OpenStore, tmp_path: Path) -> None:
    open_store()
    with pytest.raises(ServiceError) as caught:
        VideoStore.open(StorageConfig(data_dir=str(tmp_path / "data")), VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "in use" in caught.value.message


async def test_unusable_folder_is_named() -> None:
    with pytest.raises(ServiceError) as caught:
        VideoStore.open(StorageConfig(data_dir="/proc/nothing"), VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "/proc/nothing" in caught.value.message


async def test_index_of_another_format_is_made_again(open_store: OpenStore, video: bytes) -> None:
    store = open_store()
    record = await upload(store, video)
    await store.close()
    index_path = store._repository.index_path(record.video_id)
    index_path.rename(index_path.with_name("index.npz"))
    store = open_store()
    assert (await store.get_video(record.video_id)).state is VideoState.UPLOADING
    again = await store.finish_upload(record.video_id)
    assert (again.state, again.info) == (VideoState.READY, record.info)
    assert index_path.exists()


async def test_foreign_database_is_named_and_the_folder_let_go(tmp_path: Path) -> None:
    config = StorageConfig(data_dir=str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    database = tmp_path / "data" / "videos.db"
    database.write_bytes(b"this is no database, but it is long enough to look at" * 40)
    with pytest.raises(ServiceError, match=r"videos\.db: file is not a database") as caught:
        VideoStore.open(config, VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    database.unlink()
    await VideoStore.open(config, VideoConfig()).close()


async def test_stray_folders_and_lost_files_are_cleared(
    open_store: OpenStore, video: bytes
) -> None:
    store = open_store()
    record = await upload(store, video)
    await store.close()
    (store._repository.videos_dir / "vid_halfdeleted").mkdir()
    store._repository.input_path(record.video_id).unlink()
    store = open_store()
    assert list(store._repository.videos_dir.iterdir()) == []
    await refused(Reason.UNKNOWN_VIDEO, store.get_video(record.video_id))
