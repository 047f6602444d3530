"""Imports of files of this machine."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from prefill_service.errors import Reason
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.video.uploading import OpenStore, digest, refused


async def test_import_below_a_root(open_store: OpenStore, tmp_path: Path, video: bytes) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    source = root / "sub" / "Film 1.mp4"
    source.write_bytes(video)
    store = open_store(import_roots=[str(root)])
    request_id = str(uuid.uuid4())
    record = await store.import_video(str(source), "", request_id)
    assert (record.state, record.display_name) == (VideoState.READY, "Film 1.mp4")
    assert record.sha256 == digest(video)
    again = await store.import_video(str(source), "", request_id)
    same_content = await store.import_video(str(source), "other name")
    assert again.video_id == same_content.video_id == record.video_id
    source.write_bytes(b"changed afterwards")
    async with store.hold_video(record.video_id) as held:
        assert held.path.read_bytes() == video


async def test_import_refuses_what_is_not_below_a_root(
    open_store: OpenStore, tmp_path: Path, video: bytes
) -> None:
    root = tmp_path / "in"
    outside = tmp_path / "outside.mp4"
    root.mkdir()
    outside.write_bytes(video)
    (root / "link.mp4").symlink_to(outside)
    (tmp_path / "in-not").mkdir()
    (tmp_path / "in-not" / "v.mp4").write_bytes(video)
    os.mkfifo(root / "fifo.mp4")
    store = open_store(import_roots=[str(root)])
    for path in ("link.mp4", "../outside.mp4", "../in-not/v.mp4", "../nothing.mp4"):
        await refused(Reason.PATH_NOT_ALLOWED, store.import_video(str(root / path)))
    for path in ("fifo.mp4", "nothing.mp4", "."):
        await refused(Reason.NOT_A_VIDEO, store.import_video(str(root / path)))
    for path in ("relative.mp4", str(root / "nul\0.mp4"), ""):
        await refused(Reason.INVALID_REQUEST, store.import_video(path))
    assert (await store.list_videos())[0] == []


async def test_import_without_roots_is_refused(store: VideoStore, tmp_path: Path) -> None:
    await refused(Reason.PATH_NOT_ALLOWED, store.import_video(str(tmp_path)))
