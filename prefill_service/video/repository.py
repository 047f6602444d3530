"""The rows, files and locks of the videos in a data folder. Blocking."""

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
from prefill_service.video.database import VideoDatabase, VideoRow
from prefill_service.video.records import VideoRecord, VideoState

logger = logging.getLogger(__name__)

_INDEX_FILE = "index.3.npz"  # the number is the format's: one of another format is made anew


class VideoRepository:
    """``videos.db`` and ``videos/<video_id>/{input.bin,index.3.npz}`` of a data folder.

    Attributes:
        database: the rows.
        videos_dir: the folder of the videos' folders.
    """

    def __init__(
        self, database: VideoDatabase, videos_dir: Path, lock_fd: int, expire_s: float
    ) -> None:
        self.database = database
        self.videos_dir = videos_dir
        self._lock_fd = lock_fd
        self._expire_s = expire_s
        self._locks: dict[str, threading.Lock] = {}
        self._unsaved_expiry: dict[str, float] = {}

    @classmethod
    def open(cls, storage: StorageConfig) -> VideoRepository:
        """Lock the data folder for this process, and repair what a killed one left there.

        Raises:
            ServiceError: CONFIG_INVALID if another process uses the folder, or it or the
                database in it cannot be used.
        """
        root = Path(storage.data_dir).expanduser()
        videos_dir = root / "videos"
        lock_fd = files.lock_data_dir(root, videos_dir)
        try:
            database = VideoDatabase.open(root / "videos.db")
        except ServiceError:
            os.close(lock_fd)
            raise
        repository = cls(database, videos_dir, lock_fd, storage.expire_hours * 3600)
        repository._repair()
        return repository

    def _repair(self) -> None:
        """Make unfinished videos UPLOADING, and remove rows without files and files without row."""
        for row in self.database.list_all():
            if not self.folder_of(row.video_id).exists():
                logger.info("video %s was deleted, but its row had no room to be", row.video_id)
                self.database.hide_video(row.video_id)
            elif row.state is VideoState.PROBING:
                self.database.set_state(row.video_id, VideoState.UPLOADING)
            elif row.state is not VideoState.READY:
                continue
            elif not self.input_path(row.video_id).exists():
                logger.error("the file of video %s is gone; the video is removed", row.video_id)
                self.database.hide_video(row.video_id)
            elif not self.index_path(row.video_id).exists():  # or it is of an earlier format
                logger.warning("video %s has to be indexed again: FinishUpload", row.video_id)
                self.database.set_state(row.video_id, VideoState.UPLOADING)
        known = {row.video_id for row in self.database.list_all()}
        for folder in self.videos_dir.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        self.finish_deletions()

    def close(self) -> None:
        """Close the database and unlock the data folder."""
        self.database.close()
        os.close(self._lock_fd)

    # ---- paths and locks --------------------------------------------------------------

    def folder_of(self, video_id: str) -> Path:
        """A video's folder; UNKNOWN_VIDEO for what is no id: clients may send ``../..``."""
        if not is_id("vid", video_id):
            raise _unknown(video_id)
        return self.videos_dir / video_id

    def input_path(self, video_id: str) -> Path:
        """The file of the uploaded bytes."""
        return self.folder_of(video_id) / "input.bin"

    def index_path(self, video_id: str) -> Path:
        """The file of the index, which a READY video has."""
        return self.folder_of(video_id) / _INDEX_FILE

    def lock(self, name: str) -> threading.Lock:
        """The lock of an existing video, or of an operation that makes new ones."""
        return self._locks.setdefault(name, threading.Lock())

    def remove_files(self, video_id: str) -> None:
        """Remove a video's folder and forget its lock."""
        files.remove_folder(self.folder_of(video_id))
        self._locks.pop(video_id, None)
        self._unsaved_expiry.pop(video_id, None)

    def delete_video(self, video_id: str) -> None:
        """Remove a video that nobody holds: its files first, which makes room for all the rest.

        Without its folder it is deleted, over a restart too; the row goes as soon as it can.
        """
        self.database.hide_video(video_id)
        self.remove_files(video_id)
        self._delete_row(video_id)

    def finish_deletions(self) -> None:
        """Remove the rows of deleted videos, those that the disk had no room to remove before."""
        for video_id in self.database.hidden:
            if not self.folder_of(video_id).exists():  # else it is being deleted now
                self._delete_row(video_id)

    def _delete_row(self, video_id: str) -> None:
        try:
            self.database.delete_video(video_id)
        except ServiceError as error:
            logger.warning("video %s is deleted, its row will be later: %s", video_id, error)

    # ---- rows and records -------------------------------------------------------------

    def get_row(self, video_id: str) -> VideoRow:
        """A video's row; UNKNOWN_VIDEO if there is none."""
        row = self.database.find_video(video_id)
        if row is None:
            raise _unknown(video_id)
        return row

    def insert_upload(
        self, display_name: str, size_bytes: int, sha256: str, *, allow_truncated: bool
    ) -> str:
        """Make the folder and the row of a new video, UPLOADING; returns its id."""
        video_id = new_id("vid")
        files.make_folder(self.folder_of(video_id))
        try:
            self.database.insert_video(
                video_id,
                display_name=display_name,
                size_bytes=size_bytes,
                sha256=sha256,
                create_time=time.time(),
                expire_time=time.time() + self._expire_s,
                allow_truncated=allow_truncated,
            )
        except BaseException:
            self.remove_files(video_id)
            raise
        return video_id

    def extend_expiry(self, video_id: str) -> None:
        """Move a video's expiry on, because the video is used; in memory only on a full disk."""
        expire_time = time.time() + self._expire_s
        try:
            self.database.extend_expiry(video_id, expire_time)
        except ServiceError as error:
            self._unsaved_expiry[video_id] = expire_time
            logger.warning("the use of video %s is not written down: %s", video_id, error)
        else:
            self._unsaved_expiry.pop(video_id, None)

    def find_request(self, request_id: str, arguments: str) -> str | None:
        """The video that the first request with this id led to, if there was one.

        Raises:
            ServiceError: INVALID_REQUEST if its arguments were others.
        """
        if not request_id:
            return None
        found = self.database.find_request(request_id)
        if found is None:
            return None
        first_arguments, video_id = found
        if first_arguments != arguments:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"request_id {request_id} was used before with other arguments",
                name="request_id",
                value=request_id,
            )
        return video_id

    def get_record(self, video_id: str) -> VideoRecord:
        """A video's record; UNKNOWN_VIDEO if there is none."""
        return self.make_record(self.get_row(video_id))

    def make_record(self, row: VideoRow) -> VideoRecord:
        """The record of a row: an upload's bytes and expiry are those of its file."""
        committed = row.size_bytes
        expire_time = max(row.expire_time, self._unsaved_expiry.get(row.video_id, 0.0))
        if row.state is VideoState.FAILED:
            committed = 0
        elif row.state is VideoState.UPLOADING:
            committed = files.committed_bytes(self.input_path(row.video_id))
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

    def list_records(self, before: int, count: int) -> tuple[Sequence[VideoRecord], str]:
        """Up to ``count`` records older than ``before``, and the token of the next page."""
        rows = self.database.list_page(before, count + 1)
        token = str(rows[count - 1].seq) if len(rows) > count else ""
        return [self.make_record(row) for row in rows[:count]], token


def _unknown(video_id: str) -> ServiceError:
    return ServiceError(Reason.UNKNOWN_VIDEO, f"there is no video {video_id!r}", video_id=video_id)
