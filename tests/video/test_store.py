"""The video store: uploads that break, stop, repeat and collide."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.index import VideoIndex
from prefill_service.video.records import VideoRecord, VideoState
from prefill_service.video.store import VideoStore

Open = Callable[..., VideoStore]


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Open]:
    """``open_store(**storage)`` opens a store on the test's folder, the former one closed."""
    stores: list[VideoStore] = []

    def opened(**storage: object) -> VideoStore:
        config = StorageConfig(data_dir=str(tmp_path / "data"), min_free_bytes=0)
        for name, value in storage.items():
            setattr(config, name, value)
        stores.append(VideoStore(config, VideoConfig()))
        return stores[-1]

    yield opened
    if stores:
        await stores[-1].close()


@pytest.fixture
def store(open_store: Open) -> VideoStore:
    return open_store()


@pytest.fixture
def video(samples: dict[str, Path]) -> bytes:
    return samples["h264_b_frames"].read_bytes()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def create(store: VideoStore, data: bytes, **changes: object) -> VideoRecord:
    arguments = {"display_name": "v.mp4", "size_bytes": len(data), "sha256": digest(data)}
    return await store.create_upload(**{**arguments, **changes})


async def upload(store: VideoStore, data: bytes) -> VideoRecord:
    record = await create(store, data)
    await store.append(record.video_id, 0, data)
    return await store.finish(record.video_id)


async def refused(reason: Reason, awaitable) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await awaitable
    assert caught.value.reason is reason, caught.value
    return caught.value


def files_of(store: VideoStore, video_id: str) -> list[str]:
    folder = store._inventory.folder / video_id
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


async def test_upload_in_chunks_becomes_ready(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    assert record.state is VideoState.UPLOADING
    assert record.video_id.startswith("vid_")
    assert len(record.video_id) == 30
    for offset in range(0, len(video), 1000):
        chunk = video[offset : offset + 1000]
        assert await store.append(record.video_id, offset, chunk) == offset + len(chunk)
    done = await store.finish(record.video_id)
    assert done.state is VideoState.READY
    assert done.committed_bytes == done.size_bytes == len(video)
    assert done.info is not None
    assert (done.info.width, done.info.height, done.info.frame_count) == (96, 64, 40)
    assert done == await store.finish(record.video_id) == await store.get(record.video_id)
    async with store.hold(record.video_id) as held:
        assert held.path.read_bytes() == video
        assert VideoIndex.load(held.index_path).frame_count == 40


async def test_wrong_offset_names_both_numbers_and_loses_nothing(
    store: VideoStore, video: bytes
) -> None:
    record = await create(store, video)
    await store.append(record.video_id, 0, video[:1000])
    for offset in (0, 999, 1001):
        error = await refused(
            Reason.UPLOAD_OFFSET_MISMATCH, store.append(record.video_id, offset, b"x")
        )
        assert error.metadata == {"offset": str(offset), "committed_bytes": "1000"}
    assert (await store.status(record.video_id)).committed_bytes == 1000
    await store.append(record.video_id, 1000, video[1000:])
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_more_than_announced_is_refused(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    await refused(Reason.UPLOAD_SIZE_EXCEEDED, store.append(record.video_id, 0, video + b"x"))
    assert (await store.status(record.video_id)).committed_bytes == 0


async def test_finish_before_the_end_says_how_much_is_there(
    store: VideoStore, video: bytes
) -> None:
    record = await create(store, video)
    await store.append(record.video_id, 0, video[:10])
    error = await refused(Reason.UPLOAD_INCOMPLETE, store.finish(record.video_id))
    assert error.metadata == {"committed_bytes": "10", "size_bytes": str(len(video))}


async def test_wrong_digest_starts_the_upload_again(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    broken = video[:-1] + bytes([video[-1] ^ 1])
    await store.append(record.video_id, 0, broken)
    error = await refused(Reason.UPLOAD_DIGEST_MISMATCH, store.finish(record.video_id))
    assert error.metadata == {"sha256": digest(broken), "announced_sha256": digest(video)}
    assert (await store.status(record.video_id)).committed_bytes == 0
    await store.append(record.video_id, 0, video)
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_refused_file_is_failed_with_its_reason_and_gone(store: VideoStore) -> None:
    text = b"not a video at all\n" * 100
    record = await create(store, text)
    await store.append(record.video_id, 0, text)
    for _ in range(2):  # finishing again says the same
        await refused(Reason.NOT_A_VIDEO, store.finish(record.video_id))
    failed = await store.get(record.video_id)
    assert (failed.state, failed.error_reason) == (VideoState.FAILED, "NOT_A_VIDEO")
    assert failed.error_message
    assert files_of(store, record.video_id) == []
    await refused(Reason.NOT_A_VIDEO, store.append(record.video_id, 0, text))
    await refused(Reason.VIDEO_NOT_READY, store.hold(record.video_id).__aenter__())
    assert (await create(store, text)).video_id != record.video_id  # may be tried again


async def test_upload_goes_on_after_a_restart(open_store: Open, video: bytes) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append(record.video_id, 0, video[:1234])
    await store.close()
    store = open_store()
    assert (await store.status(record.video_id)).committed_bytes == 1234
    await store.append(record.video_id, 1234, video[1234:])
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_committed_size_is_the_length_of_the_file(open_store: Open, video: bytes) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append(record.video_id, 0, video[:2000])
    os.truncate(store._inventory.input_path(record.video_id), 1500)  # what a power cut may leave
    assert (await store.status(record.video_id)).committed_bytes == 1500
    await store.append(record.video_id, 1500, video[1500:])
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_interrupted_probe_can_be_finished_after_a_restart(
    open_store: Open, video: bytes
) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append(record.video_id, 0, video)
    finishing = asyncio.create_task(store.finish(record.video_id))
    while (await store.get(record.video_id)).state is not VideoState.PROBING:
        await asyncio.sleep(0.01)
    await store.close()
    await refused(Reason.CANCELLED, finishing)
    store = open_store()
    assert (await store.get(record.video_id)).state is VideoState.UPLOADING
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_killed_service_loses_nothing(tmp_path: Path, video: bytes) -> None:
    """A real process, killed while it probes."""
    script = """
import asyncio, hashlib, os, signal, sys
from pathlib import Path
from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.video.store import VideoStore
async def main():
    data = Path(sys.argv[2]).read_bytes()
    store = VideoStore(StorageConfig(data_dir=sys.argv[1], min_free_bytes=0), VideoConfig())
    made = await store.create_upload("v", len(data), hashlib.sha256(data).hexdigest())
    await store.append(made.video_id, 0, data)
    asyncio.create_task(store.finish(made.video_id))
    while (await store.get(made.video_id)).state != "PROBING":
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
    store = VideoStore(StorageConfig(data_dir=str(tmp_path / "data")), VideoConfig())
    record = await store.get(video_id)
    assert (record.state, record.committed_bytes) == (VideoState.UPLOADING, len(video))
    assert (await store.finish(video_id)).state is VideoState.READY
    await store.close()


async def test_concurrent_finishes_share_one_probe(
    store: VideoStore, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefill_service.video import uploads as module

    probes = []

    async def counted(path: Path, limits: VideoConfig, spares: object) -> VideoIndex:
        probes.append(path)
        return await real(path, limits)

    real = module.probe_video
    monkeypatch.setattr(module, "probe_video", counted)
    record = await create(store, video)
    await store.append(record.video_id, 0, video)
    gone = asyncio.create_task(store.finish(record.video_id))
    await asyncio.sleep(0.05)
    others = [asyncio.create_task(store.finish(record.video_id)) for _ in range(4)]
    gone.cancel()  # one client leaves, the others get their answer
    done = await asyncio.gather(*others)
    assert {r.state for r in done} == {VideoState.READY}
    assert len(probes) == 1


async def test_of_two_concurrent_writers_one_wins(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    for offset in range(0, len(video), 500):
        chunk = video[offset : offset + 500]
        results = await asyncio.gather(
            *(store.append(record.video_id, offset, chunk) for _ in range(3)),
            return_exceptions=True,
        )
        assert results.count(offset + len(chunk)) == 1
        reasons = [r.reason for r in results if isinstance(r, ServiceError)]
        # After the last chunk the losers' offset is not committed; before it neither.
        assert reasons == [Reason.UPLOAD_OFFSET_MISMATCH] * 2
    assert (await store.finish(record.video_id)).state is VideoState.READY


async def test_ready_video_with_the_same_digest_is_returned(
    store: VideoStore, video: bytes
) -> None:
    first = await create(store, video)
    second = await create(store, video)  # the first is not READY yet
    assert second.video_id != first.video_id
    await store.append(first.video_id, 0, video)
    await store.finish(first.video_id)
    third = await create(store, video, sha256=digest(video).upper(), display_name="other")
    assert (third.video_id, third.state) == (first.video_id, VideoState.READY)


async def test_request_id_returns_the_first_result(store: VideoStore, video: bytes) -> None:
    request_id = str(uuid.uuid4())
    records = await asyncio.gather(*(create(store, video, request_id=request_id) for _ in range(5)))
    assert len({record.video_id for record in records}) == 1
    await refused(Reason.INVALID_REQUEST, create(store, video, request_id=request_id, size_bytes=1))
    assert (await create(store, video)).video_id != records[0].video_id


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"size_bytes": 0}, Reason.INVALID_REQUEST, "size_bytes"),
        ({"size_bytes": -5}, Reason.INVALID_REQUEST, "-5"),
        ({"size_bytes": (8 << 30) + 1}, Reason.UPLOAD_SIZE_EXCEEDED, str(8 << 30)),
        ({"sha256": "abc"}, Reason.INVALID_REQUEST, "sha256"),
        ({"sha256": ""}, Reason.INVALID_REQUEST, "sha256"),
        ({"sha256": "g" * 64}, Reason.INVALID_REQUEST, "64 hexadecimal"),
        ({"display_name": "n" * 256}, Reason.INVALID_REQUEST, "255"),
        ({"request_id": "not-a-uuid"}, Reason.INVALID_REQUEST, "request_id"),
    ],
)
async def test_bad_arguments_are_named(
    changes: dict, reason: Reason, named: str, store: VideoStore, video: bytes
) -> None:
    assert named in (await refused(reason, create(store, video, **changes))).message
    assert (await store.list())[0] == []


async def test_unknown_ids(store: VideoStore) -> None:
    calls = [store.get, store.status, store.finish, store.delete, store.touch]
    for call in calls:
        error = await refused(Reason.UNKNOWN_VIDEO, call("vid_nothing"))
        assert error.metadata == {"video_id": "vid_nothing"}
    await refused(Reason.UNKNOWN_VIDEO, store.append("../../etc", 0, b"x"))
    await refused(Reason.UNKNOWN_VIDEO, store.hold("vid_nothing").__aenter__())
    assert store._inventory._locks.keys() <= {"create", "import", "vid_nothing"}


async def test_ids_that_are_paths_reach_no_files(store: VideoStore, tmp_path: Path) -> None:
    """A prefill or question names a video; whatever it names, nothing outside is touched."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in ("../../outside", str(outside), "..", ".", "", "vid_../../../outside"):
        await refused(Reason.UNKNOWN_VIDEO, store.hold(path).__aenter__())
    assert outside.is_dir()
    assert (tmp_path / "data" / "videos").is_dir()


async def test_pages_are_newest_first_and_complete(store: VideoStore, video: bytes) -> None:
    made = [(await create(store, video)).video_id for _ in range(7)]
    seen, token = [], ""
    while True:
        page, token = await store.list(page_size=3, page_token=token)
        seen += [record.video_id for record in page]
        if not token:
            break
    assert seen == made[::-1]
    assert len((await store.list(page_size=5000))[0]) == 7
    await refused(Reason.INVALID_REQUEST, store.list(page_size=-1))
    await refused(Reason.INVALID_REQUEST, store.list(page_token="rubbish"))


async def test_disk_below_its_reserve_refuses_and_the_upload_goes_on_later(
    open_store: Open, video: bytes
) -> None:
    store = open_store()
    record = await create(store, video)
    await store.append(record.video_id, 0, video[:100])
    await store.close()
    full = open_store(min_free_bytes=1 << 60)
    error = await refused(Reason.STORAGE_FULL, full.append(record.video_id, 100, video[100:]))
    assert error.metadata["min_free_bytes"] == str(1 << 60)
    await refused(Reason.STORAGE_FULL, create(full, video))
    assert (await full.status(record.video_id)).committed_bytes == 100
    await full.close()
    store = open_store()
    await store.append(record.video_id, 100, video[100:])
    assert (await store.finish(record.video_id)).state is VideoState.READY


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
    store = VideoStore(storage, VideoConfig())
    data = bytes(range(256)) * 2048
    made = await store.create_upload("v", 400_000, hashlib.sha256(data).hexdigest())
    offset, chunk = 0, data[:100_000]
    if not limit:
        (store._inventory.folder.parent / "ballast").write_bytes(bytes(700_000))
    try:
        for offset in range(0, 400_000, 100_000):
            await store.append(made.video_id, offset, chunk)
    except ServiceError as error:
        print(error.reason, offset, (await store.status(made.video_id)).committed_bytes)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    else:
        (store._inventory.folder.parent / "ballast").unlink()
    print(await store.append(made.video_id, offset, chunk))
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


async def test_import_below_a_root(open_store: Open, tmp_path: Path, video: bytes) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    source = root / "sub" / "Film 1.mp4"
    source.write_bytes(video)
    store = open_store(import_roots=[str(root)])
    request_id = str(uuid.uuid4())
    record = await store.import_path(str(source), "", request_id)
    assert (record.state, record.display_name) == (VideoState.READY, "Film 1.mp4")
    assert record.sha256 == digest(video)
    again = await store.import_path(str(source), "", request_id)
    same_content = await store.import_path(str(source), "other name")
    assert again.video_id == same_content.video_id == record.video_id
    source.write_bytes(b"changed afterwards")
    async with store.hold(record.video_id) as held:
        assert held.path.read_bytes() == video


async def test_import_refuses_what_is_not_below_a_root(
    open_store: Open, tmp_path: Path, video: bytes
) -> None:
    root, outside = tmp_path / "in", tmp_path / "outside.mp4"
    root.mkdir()
    outside.write_bytes(video)
    (root / "link.mp4").symlink_to(outside)
    (tmp_path / "in-not").mkdir()
    (tmp_path / "in-not" / "v.mp4").write_bytes(video)
    os.mkfifo(root / "fifo.mp4")
    store = open_store(import_roots=[str(root)])
    for path in ("link.mp4", "../outside.mp4", "../in-not/v.mp4", "../nothing.mp4"):
        await refused(Reason.PATH_NOT_ALLOWED, store.import_path(str(root / path)))
    for path in ("fifo.mp4", "nothing.mp4", "."):
        await refused(Reason.NOT_A_VIDEO, store.import_path(str(root / path)))
    for path in ("relative.mp4", str(root / "nul\0.mp4"), ""):
        await refused(Reason.INVALID_REQUEST, store.import_path(path))
    assert (await store.list())[0] == []


async def test_import_without_roots_is_refused(store: VideoStore, tmp_path: Path) -> None:
    await refused(Reason.PATH_NOT_ALLOWED, store.import_path(str(tmp_path)))


async def test_deleted_video_stays_while_it_is_held(store: VideoStore, video: bytes) -> None:
    record = await upload(store, video)
    async with store.hold(record.video_id) as held:
        async with store.hold(record.video_id):
            await store.delete(record.video_id)
        await refused(Reason.UNKNOWN_VIDEO, store.get(record.video_id))
        await refused(Reason.UNKNOWN_VIDEO, store.delete(record.video_id))
        assert held.path.read_bytes() == video
    assert files_of(store, record.video_id) == []
    assert not store._holds
    assert (await create(store, video)).state is VideoState.UPLOADING  # no stale duplicate


async def test_delete_stops_a_probe(store: VideoStore, video: bytes) -> None:
    record = await create(store, video)
    await store.append(record.video_id, 0, video)
    finishing = asyncio.create_task(store.finish(record.video_id))
    await asyncio.sleep(0.1)
    await store.delete(record.video_id)
    with pytest.raises(ServiceError):
        await finishing
    assert files_of(store, record.video_id) == []
    await refused(Reason.UNKNOWN_VIDEO, store.get(record.video_id))


async def test_sweep_removes_what_nobody_used(
    open_store: Open, video: bytes, samples: dict[str, Path]
) -> None:
    store = open_store(expire_hours=2 / 3600)
    ready = await upload(store, video)
    held = await upload(store, samples["h264_one_frame"].read_bytes())
    half = await create(store, b"12345")
    await store.append(half.video_id, 0, b"123")
    assert await store.sweep() == []
    async with store.hold(held.video_id):
        await asyncio.sleep(2.2)
        await store.append(half.video_id, 3, b"4")  # an upload that goes on does not expire
        assert await store.sweep() == [ready.video_id]
    assert files_of(store, ready.video_id) == []
    assert (await store.get(held.video_id)).expire_time > time.time()  # using it moved it on
    await asyncio.sleep(2.2)
    assert set(await store.sweep()) == {held.video_id, half.video_id}
    assert list(store._inventory.folder.iterdir()) == []


async def test_touch_moves_the_expiry(open_store: Open, video: bytes) -> None:
    store = open_store(expire_hours=1)
    record = await create(store, video)
    await asyncio.sleep(0.05)
    assert (await store.touch(record.video_id)).expire_time > record.expire_time


async def test_folder_is_for_one_process(open_store: Open, tmp_path: Path) -> None:
    open_store()
    with pytest.raises(ServiceError) as caught:
        VideoStore(StorageConfig(data_dir=str(tmp_path / "data")), VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "in use" in caught.value.message


async def test_unusable_folder_is_named() -> None:
    with pytest.raises(ServiceError) as caught:
        VideoStore(StorageConfig(data_dir="/proc/nothing"), VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert "/proc/nothing" in caught.value.message


async def test_foreign_database_is_named_and_the_folder_let_go(tmp_path: Path) -> None:
    config = StorageConfig(data_dir=str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    database = tmp_path / "data" / "videos.db"
    database.write_bytes(b"this is no database, but it is long enough to look at" * 40)
    with pytest.raises(ServiceError, match=r"videos\.db: file is not a database") as caught:
        VideoStore(config, VideoConfig())
    assert caught.value.reason is Reason.CONFIG_INVALID
    database.unlink()
    await VideoStore(config, VideoConfig()).close()


async def test_left_over_folders_and_lost_files_are_cleared(open_store: Open, video: bytes) -> None:
    store = open_store()
    record = await upload(store, video)
    await store.close()
    (store._inventory.folder / "vid_halfdeleted").mkdir()
    store._inventory.input_path(record.video_id).unlink()
    store = open_store()
    assert list(store._inventory.folder.iterdir()) == []
    await refused(Reason.UNKNOWN_VIDEO, store.get(record.video_id))
