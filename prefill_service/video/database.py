"""The table of videos, in SQLite. Blocking; safe to use from several threads."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefill_service.errors import ServiceError
from prefill_service.storage.sqlite_database import SqliteDatabase, run_script
from prefill_service.video.records import VideoInfo, VideoState

_SCHEMA = """
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
    error_message TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS videos_by_digest ON videos (sha256, state);
CREATE TABLE IF NOT EXISTS requests (
    request_id TEXT PRIMARY KEY,
    arguments TEXT NOT NULL,
    video_id TEXT NOT NULL REFERENCES videos (video_id) ON DELETE CASCADE
)
"""


def _create_tables(db: sqlite3.Connection) -> None:
    """From version 0: an empty file, or a database of releases that counted no versions."""
    run_script(db, _SCHEMA)
    columns = [row["name"] for row in db.execute("PRAGMA table_info(videos)")]
    if "allow_truncated" not in columns:
        db.execute("ALTER TABLE videos ADD COLUMN allow_truncated INTEGER NOT NULL DEFAULT 0")


UPGRADES = (_create_tables,)
"""By the version found. What was released once stays as it is; changes are further ones."""


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

    Every method that writes raises STORAGE_FULL when the disk is full; ``delete_video`` and
    ``set_state`` to FAILED only when its reserve is used up, too. What is written is on disk when
    the method returns: a video that was reported READY or deleted stays so over a power cut.

    A video can be hidden: it is as good as deleted until its row can be.
    """

    def __init__(self, database: SqliteDatabase) -> None:
        self._database = database
        self._hidden: set[str] = set()

    @classmethod
    def open(cls, path: Path) -> VideoDatabase:
        """Open the file, or make it.

        Raises:
            ServiceError: CONFIG_INVALID if the file is not such a database.
        """
        return cls(SqliteDatabase.open(path, "video database", UPGRADES, durable=True))

    def close(self) -> None:
        """Close the file; no method may be called afterwards."""
        self._database.close()

    def hide_video(self, video_id: str) -> None:
        """Let no method find a video any more, in memory only."""
        self._hidden.add(video_id)

    def unhide_video(self, video_id: str) -> None:
        """Let a video be found again."""
        self._hidden.discard(video_id)

    @property
    def hidden(self) -> Sequence[str]:
        """Ids of the hidden videos."""
        return tuple(self._hidden)

    def _rows(self, where: str, *values: object) -> list[VideoRow]:
        hidden = self.hidden
        places = ", ".join("?" * len(hidden))
        rows = self._database.query(
            f"SELECT * FROM videos WHERE video_id NOT IN ({places}) AND {where}",
            (*hidden, *values),
        )
        return [_row(row) for row in rows]

    def find_video(self, video_id: str) -> VideoRow | None:
        """The row of a video, if there is one."""
        return next(iter(self._rows("video_id = ?", video_id)), None)

    def find_ready(self, sha256: str) -> VideoRow | None:
        """The oldest READY video with this digest."""
        where = "sha256 = ? AND state = ? ORDER BY seq LIMIT 1"
        return next(iter(self._rows(where, sha256, VideoState.READY)), None)

    def list_page(self, before_seq: int, count: int) -> list[VideoRow]:
        """Up to ``count`` videos older than ``before_seq``, newest first."""
        return self._rows("seq < ? ORDER BY seq DESC LIMIT ?", before_seq, count)

    def list_all(self) -> list[VideoRow]:
        """Every video, oldest first."""
        return self._rows("TRUE ORDER BY seq")

    def find_request(self, request_id: str) -> tuple[str, str] | None:
        """Arguments and video id of the first request with this id."""
        query = "SELECT arguments, video_id FROM requests WHERE request_id = ?"
        rows = self._database.query(query, (request_id,))
        found = [(row["arguments"], row["video_id"]) for row in rows]
        return next((pair for pair in found if pair[1] not in self._hidden), None)

    def record_request(self, request_id: str, arguments: str, video_id: str) -> None:
        """Keep the video that a request led to, which ``find_request`` did not find."""
        self._database.commit(
            lambda db: db.execute(
                "INSERT OR REPLACE INTO requests VALUES (?, ?, ?)",
                (request_id, arguments, video_id),
            )
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
        statement = f"INSERT INTO videos ({columns}) VALUES ({places})"
        self._database.commit(lambda db: db.execute(statement, values))

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
        self._database.commit(
            lambda db: db.execute(
                "UPDATE videos SET state = ?, info = ?, error_reason = ?, error_message = ? "
                "WHERE video_id = ?",
                (state, text, reason, message, video_id),
            ),
            essential=state is VideoState.FAILED,  # which removes the bytes
        )

    def extend_expiry(self, video_id: str, expire_time: float) -> None:
        """Move a video's expiry to ``expire_time`` unless it is later already."""
        self._database.commit(
            lambda db: db.execute(
                "UPDATE videos SET expire_time = MAX(expire_time, ?) WHERE video_id = ?",
                (expire_time, video_id),
            )
        )

    def delete_video(self, video_id: str) -> bool:
        """Remove a video and its requests; False if there was none."""
        deleted = self._database.commit(
            lambda db: db.execute("DELETE FROM videos WHERE video_id = ?", (video_id,)).rowcount,
            essential=True,
        )
        self._hidden.discard(video_id)
        return deleted > 0


def _row(row: sqlite3.Row) -> VideoRow:
    values = dict(row)
    values["state"] = VideoState(values["state"])
    values["allow_truncated"] = bool(values["allow_truncated"])
    values["info"] = VideoInfo.from_dict(json.loads(values["info"])) if values["info"] else None
    return VideoRow(**values)
