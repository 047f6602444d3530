"""What a data folder holds: the rows, files and locks of its videos. Blocking."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from prefill_service.config import StorageConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import is_id, new_id
from prefill_service.video import files
from prefill_service.video.database import Row, VideoDatabase
from prefill_service.video.records import VideoRecord, VideoState

log = logging.getLogger("prefill_service.video")


class VideoRepository:
    """``videos.db`` and ``videos/<video_id>/{input.bin,index.npz}`` of a data folder.

    Raises:
        ServiceError: CONFIG_INVALID if another process uses the folder, or it or the database
            in it cannot be used.
    """

    def __init__(self, storage: StorageConfig) -> None:
        self._expire_s = storage.expire_hours * 3600
        root = Path(storage.data_dir).expanduser()
        self.folder = root / "videos"
        self._lock_fd = files.claim(root, self.folder)
        try:
            self.catalog = VideoDatabase(root / "videos.db")
        except ServiceError:
            os.close(self._lock_fd)
            raise
        self._locks: dict[str, threading.Lock] = {}
        self._recover()

    def _recover(self) -> None:
        """Take up what a former process left: unfinished probes and half-deleted folders."""
        for row in self.catalog.all():
            if row.state is VideoState.PROBING:
                self.catalog.set_state(row.video_id, VideoState.UPLOADING)
            elif row.state is VideoState.READY and not (
                self.input_path(row.video_id).exists() and self.index_path(row.video_id).exists()
            ):
                log.error("the files of video %s are gone; the video is removed", row.video_id)
                self.catalog.delete(row.video_id)
        known = {row.video_id for row in self.catalog.all()}
        for folder in self.folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the catalogue and let go of the folder."""
        self.catalog.close()
        os.close(self._lock_fd)

    # ---- paths and locks --------------------------------------------------------------

    def home(self, video_id: str) -> Path:
        """A video's folder; ids come from clients, and ``../..`` is not one."""
        if not is_id("vid", video_id):
            raise _unknown(video_id)
        return self.folder / video_id

    def input_path(self, video_id: str) -> Path:
        """The uploaded bytes."""
        return self.home(video_id) / "input.bin"

    def index_path(self, video_id: str) -> Path:
        """The index that probing wrote."""
        return self.home(video_id) / "index.npz"

    def lock(self, name: str) -> threading.Lock:
        """The lock of a known video, or of what makes new ones."""
        return self._locks.setdefault(name, threading.Lock())

    def remove_files(self, video_id: str) -> None:
        """Remove a video's folder and forget its lock."""
        shutil.rmtree(self.home(video_id), ignore_errors=True)
        self._locks.pop(video_id, None)

    # ---- rows and records -------------------------------------------------------------

    def row(self, video_id: str) -> Row:
        """A video's row; UNKNOWN_VIDEO if there is none."""
        row = self.catalog.get(video_id)
        if row is None:
            raise _unknown(video_id)
        return row

    def insert(self, display_name: str, size_bytes: int, sha256: str) -> Row:
        """Make the folder and the row of a new video, UPLOADING."""
        video_id = new_id("vid")
        self.input_path(video_id).parent.mkdir()
        now = time.time()
        self.catalog.insert(video_id, display_name, size_bytes, sha256, now, self._expiry())
        return self.row(video_id)

    def renew(self, video_id: str) -> None:
        """Move a video's expiry on."""
        self.catalog.set_expiry(video_id, self._expiry())

    def _expiry(self) -> float:
        return time.time() + self._expire_s

    def answered(self, request_id: str, arguments: str) -> Row | None:
        """The video that the first request with this id has led to."""
        if not request_id:
            return None
        known = self.catalog.answered(request_id)
        if known is None:
            return None
        if known[0] != arguments:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"request_id {request_id} was used before with other arguments",
                field="request_id",
                value=request_id,
            )
        return self.catalog.get(known[1])

    def record(self, video_id: str) -> VideoRecord:
        """What is known of a video; UNKNOWN_VIDEO if nothing is."""
        return self.record_of(self.row(video_id))

    def record_of(self, row: Row) -> VideoRecord:
        """A row, and what its files add to it."""
        committed, expire_time = row.size_bytes, row.expire_time
        if row.state is VideoState.FAILED:
            committed = 0
        elif row.state is VideoState.UPLOADING:
            committed = files.committed(self.input_path(row.video_id))
            # A running upload does not expire, however long it takes.
            with contextlib.suppress(FileNotFoundError):
                touched = self.input_path(row.video_id).stat().st_mtime
                expire_time = max(expire_time, touched + self._expire_s)
        return VideoRecord(
            video_id=row.video_id,
            display_name=row.display_name,
            state=row.state,
            size_bytes=row.size_bytes,
            committed_bytes=committed,
            sha256=row.sha256,
            create_time=row.create_time,
            expire_time=expire_time,
            info=row.info,
            error_reason=row.error_reason,
            error_message=row.error_message,
        )

    def page(self, before: int, count: int) -> tuple[Sequence[VideoRecord], str]:
        """Up to ``count`` records older than ``before``, and the token of the next page."""
        rows = self.catalog.page(before, count + 1)
        token = str(rows[count - 1].seq) if len(rows) > count else ""
        return [self.record_of(row) for row in rows[:count]], token


def _unknown(video_id: str) -> ServiceError:
    return ServiceError(Reason.UNKNOWN_VIDEO, f"there is no video {video_id!r}", video_id=video_id)
