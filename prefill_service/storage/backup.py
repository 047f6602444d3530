"""A copy of a data folder, complete and checked, while the service that uses it goes on.

The databases are copied between two writes of the service. Then the videos that they list are:
the bytes of a READY video never change. What happens meanwhile is not in the copy, and a video that
is deleted meanwhile is left without files, which is how a deletion looks after a restart, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.storage.disk_space import copy_bytes, is_full, make_folders, sync_folder
from prefill_service.storage.sqlite_database import BACKUP_LOCK

JOBS = "jobs.db"
VIDEOS = "videos.db"
VIDEO_FOLDERS = "videos"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What a backup has.

    Attributes:
        videos: videos with all their bytes, compared with their sha256.
        uploads: videos that are not READY, with the bytes that had come.
        jobs: records of jobs.
        num_bytes: of the videos' files.
    """

    videos: int
    uploads: int
    jobs: int
    num_bytes: int


def back_up(data_dir: Path, destination: Path) -> BackupReport:
    """Copy a data folder to a new one, which a service can use as it is.

    The destination appears when it is complete and on disk, under another name until then.

    Args:
        data_dir: of a service that runs or does not.
        destination: a folder that does not exist, or is empty.

    Raises:
        ServiceError: CONFIG_INVALID if there is nothing to copy or the destination has files;
            STORAGE_FULL; INTERNAL if what was read is damaged, by name.
    """
    if not (data_dir / VIDEOS).is_file():
        raise _unusable(f"{data_dir} is no data folder: it has no {VIDEOS}", data_dir)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise _unusable(f"{destination} exists and is not an empty folder", destination)
    unfinished = destination.with_name(destination.name + _UNFINISHED)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a backup that was interrupted
        make_folders(unfinished)
        report = _copy(data_dir, unfinished)
        unfinished.rename(destination)
        sync_folder(destination.parent)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if is_full(error):
            text = f"the disk of {destination} is full; nothing is left there"
            raise ServiceError(Reason.STORAGE_FULL, text, path=destination) from error
        raise _unusable(f"cannot back up to {destination}: {error}", destination) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return report


def _copy(data_dir: Path, target: Path) -> BackupReport:
    with _no_writes(data_dir):
        # Jobs refer to videos, so no job is newer than the list of videos.
        for name in (JOBS, VIDEOS):
            for path in (data_dir / name, data_dir / f"{name}-wal"):
                with contextlib.suppress(FileNotFoundError):
                    _copy_file(path, target / path.name, sync=False)  # the service waits
    jobs = []
    if (target / JOBS).exists():
        jobs = _settle(target / JOBS, "SELECT job_id FROM jobs")
    rows = _settle(target / VIDEOS, "SELECT video_id, state, sha256 FROM videos ORDER BY seq")
    folders = target / VIDEO_FOLDERS
    folders.mkdir()
    ready = num_bytes = 0
    for video_id, state, sha256 in rows:
        num_bytes += _copy_video(data_dir / VIDEO_FOLDERS / video_id, folders / video_id)
        stored = folders / video_id / "input.bin"
        if state == "READY" and stored.exists():
            ready += 1
            _check_digest(stored, sha256)
    sync_folder(folders)
    sync_folder(target)
    copied = sum(1 for _ in folders.iterdir())
    return BackupReport(videos=ready, uploads=copied - ready, jobs=len(jobs), num_bytes=num_bytes)


@contextlib.contextmanager
def _no_writes(data_dir: Path) -> Iterator[None]:
    """Let a running service wait with its next write to a database."""
    lock = os.open(data_dir / BACKUP_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _settle(path: Path, query: str) -> list[tuple[str, ...]]:
    """Move the copied log into the copied database and check that; returns the query's rows."""
    database = sqlite3.connect(path)
    try:
        damage = [row[0] for row in database.execute("PRAGMA integrity_check")]
        if damage != ["ok"]:
            raise sqlite3.DatabaseError("; ".join(damage[:3]))
        rows = database.execute(query).fetchall()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.DatabaseError as error:
        raise ServiceError(
            Reason.INTERNAL, f"{path.name} cannot be backed up: {error}", name=path.name
        ) from error
    finally:
        database.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return rows


def _copy_video(source: Path, target: Path) -> int:
    """Copy a video's files; returns their bytes."""
    try:
        paths = sorted(source.iterdir())
    except FileNotFoundError:  # it is deleted
        return 0
    target.mkdir()
    num_bytes = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            num_bytes += _copy_file(path, target / path.name)
    sync_folder(target)
    return num_bytes


def _copy_file(source: Path, target: Path, *, sync: bool = True) -> int:
    with source.open("rb", buffering=0) as file, target.open("xb", buffering=0) as out:
        os.fchmod(out.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        copy_bytes(file.fileno(), out.fileno())
        if sync:
            os.fsync(out.fileno())
        return os.fstat(out.fileno()).st_size


def _check_digest(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        video_id = path.parent.name
        raise ServiceError(
            Reason.INTERNAL,
            f"the bytes of video {video_id} have sha256 {digest}, not {sha256}: its file is "
            "damaged; delete the video and back up again",
            video_id=video_id,
            sha256=digest,
        )


def _unusable(message: str, path: Path) -> ServiceError:
    return ServiceError(Reason.CONFIG_INVALID, message, path=path)
