"""The table of videos, in SQLite. Blocking; safe to use from several threads."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.video.records import VideoInfo, VideoState

_ALLOW_TRUNCATED = "allow_truncated INTEGER NOT NULL DEFAULT 0"
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS videos (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    video_id TEXT NOT NULL UNIQUE,
    display_name TEXT NOT NULL,
    state TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    create_time REAL NOT NULL,
    expire_time REAL NOT NULL,
    info TEXT NOT NULL DEFAULT '',
    error_reason TEXT NOT NULL DEFAULT '',
    error_message TEXT NOT NULL DEFAULT '',
    {_ALLOW_TRUNCATED}
);
CREATE INDEX IF NOT EXISTS videos_by_digest ON videos (sha256, state);
CREATE TABLE IF NOT EXISTS requests (
    request_id TEXT PRIMARY KEY,
    arguments TEXT NOT NULL,
    video_id TEXT NOT NULL REFERENCES videos (video_id) ON DELETE CASCADE
);
"""


@dataclass(frozen=True, slots=True)
class VideoRow:
    """One row of the table ``videos``."""

    seq: int
    video_id: str
    display_name: str
    state: VideoState
    size_bytes: int
    sha256: str
    create_time: float
    expire_time: float
    info: VideoInfo | None
    error_reason: str
    error_message: str
    allow_truncated: bool


class VideoDatabase:
    """Videos and the requests that made them.

    Every method that writes raises STORAGE_FULL when the disk is full.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._lock = threading.Lock()
        self._db = db

    @classmethod
    def open(cls, path: Path) -> VideoDatabase:
        """Open the file, or make it.

        Raises:
            ServiceError: CONFIG_INVALID if the file is not such a database.
        """
        try:
            db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            # FULL: a video that was reported READY or deleted stays so over a power cut.
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            db.executescript(_SCHEMA)
            columns = [row["name"] for row in db.execute("PRAGMA table_info(videos)")]
            if "allow_truncated" not in columns:  # a database of an earlier format
                db.execute(f"ALTER TABLE videos ADD COLUMN {_ALLOW_TRUNCATED}")
        except sqlite3.Error as error:
            raise ServiceError(
                Reason.CONFIG_INVALID, f"cannot use the video database {path}: {error}", path=path
            ) from error
        return cls(db)

    def close(self) -> None:
        """Close the file; no method may be called afterwards."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                    raise ServiceError(
                        Reason.STORAGE_FULL, "the disk that holds the video database is full"
                    ) from error
                raise

    def _rows(self, where: str, *values: object) -> list[VideoRow]:
        with self._lock:
            return [_row(r) for r in self._db.execute(f"SELECT * FROM videos {where}", values)]

    def find_video(self, video_id: str) -> VideoRow | None:
        """The row of a video, if there is one."""
        return next(iter(self._rows("WHERE video_id = ?", video_id)), None)

    def find_ready(self, sha256: str) -> VideoRow | None:
        """The oldest READY video with this digest."""
        where = "WHERE sha256 = ? AND state = ? ORDER BY seq LIMIT 1"
        return next(iter(self._rows(where, sha256, VideoState.READY)), None)

    def list_page(self, before_seq: int, count: int) -> list[VideoRow]:
        """Up to ``count`` videos older than ``before_seq``, newest first."""
        return self._rows("WHERE seq < ? ORDER BY seq DESC LIMIT ?", before_seq, count)

    def list_all(self) -> list[VideoRow]:
        """Every video, oldest first."""
        return self._rows("ORDER BY seq")

    def find_request(self, request_id: str) -> tuple[str, str] | None:
        """Arguments and video id of the first request with this id."""
        query = "SELECT arguments, video_id FROM requests WHERE request_id = ?"
        with self._lock:
            row = self._db.execute(query, (request_id,)).fetchone()
        return (row["arguments"], row["video_id"]) if row else None

    def record_request(self, request_id: str, arguments: str, video_id: str) -> None:
        """Keep the video that a request led to; an earlier one of the same id stays."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO requests VALUES (?, ?, ?)",
                (request_id, arguments, video_id),
            )

    def insert_video(
        self,
        video_id: str,
        *,
        display_name: str,
        size_bytes: int,
        sha256: str,
        create_time: float,
        expire_time: float,
        allow_truncated: bool = False,
    ) -> None:
        """Add a video in state UPLOADING."""
        values = {
            "video_id": video_id,
            "display_name": display_name,
            "state": VideoState.UPLOADING,
            "size_bytes": size_bytes,
            "sha256": sha256,
            "create_time": create_time,
            "expire_time": expire_time,
            "allow_truncated": allow_truncated,
        }
        columns = ", ".join(values)
        places = ", ".join(f":{name}" for name in values)
        with self._transaction() as db:
            db.execute(f"INSERT INTO videos ({columns}) VALUES ({places})", values)

    def set_state(
        self,
        video_id: str,
        state: VideoState,
        *,
        info: VideoInfo | None = None,
        error: ServiceError | None = None,
    ) -> None:
        """Move a video to ``state``, with its info when READY or its error when FAILED."""
        text = json.dumps(info.to_dict()) if info else ""
        reason, message = (str(error.reason), error.message) if error else ("", "")
        with self._transaction() as db:
            db.execute(
                "UPDATE videos SET state = ?, info = ?, error_reason = ?, error_message = ? "
                "WHERE video_id = ?",
                (state, text, reason, message, video_id),
            )

    def extend_expiry(self, video_id: str, expire_time: float) -> None:
        """Move a video's expiry to ``expire_time`` unless it is later already."""
        with self._transaction() as db:
            db.execute(
                "UPDATE videos SET expire_time = MAX(expire_time, ?) WHERE video_id = ?",
                (expire_time, video_id),
            )

    def delete_video(self, video_id: str) -> bool:
        """Remove a video and its requests; False if there was none."""
        with self._transaction() as db:
            return db.execute("DELETE FROM videos WHERE video_id = ?", (video_id,)).rowcount > 0


def _row(row: sqlite3.Row) -> VideoRow:
    values = dict(row)
    values["state"] = VideoState(values["state"])
    values["allow_truncated"] = bool(values["allow_truncated"])
    values["info"] = VideoInfo.from_dict(json.loads(values["info"])) if values["info"] else None
    return VideoRow(**values)
