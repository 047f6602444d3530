"""A SQLite file that survives power cuts, full disks and new releases. Blocking."""

from __future__ import annotations

import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from prefill_service.errors import Reason, ServiceError
from prefill_service.storage.disk_space import DiskReserve, probe_full, sync_folder

logger = logging.getLogger(__name__)

T = TypeVar("T")

BACKUP_LOCK = "backup.lock"
"""Beside the database: locked shared by each write, and exclusively by who copies the files."""

Upgrade = Callable[[sqlite3.Connection], None]
"""Brings a database from one version of its schema to the next, inside a transaction."""

_SYSTEM_ERRORS = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
"""Primary codes by which SQLite also reports a full disk: no quota, no room for a new file."""


class SqliteDatabase:
    """A database in write-ahead mode, opened by ``open``; for any thread.

    The last commits before a power cut survive if the database is ``durable``, or ``sync`` was
    called after them. Without either they are lost, and nothing else is.

    No other process can open the file meanwhile. So the index of the write-ahead log is in this
    one's memory, and not in a mapped file: a disk without room for a page of that would end the
    process by SIGBUS. A backup copies the files, between two writes (``BACKUP_LOCK``).

    On a full disk a write first moves what is in the write-ahead log to the database, so that the
    log starts again in the space that it has. Essential writes then take a reserve as well.
    """

    def __init__(
        self, connection: sqlite3.Connection, path: Path, reserve: DiskReserve, backup_lock: int
    ) -> None:
        self._db = connection
        self._path = path
        self._backup_lock = backup_lock
        self._reserve = reserve
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, name: str, upgrades: Sequence[Upgrade], *, durable: bool
    ) -> SqliteDatabase:
        """Open the file, or make it, and bring it to the newest version.

        Args:
            path: the file.
            name: what it is, for messages: "job database".
            upgrades: the one at index i leads from version i to i + 1.
            durable: whether each commit waits until the disk has it.

        Raises:
            ServiceError: CONFIG_INVALID if the file is not such a database, or of a later version.
        """
        reserve = DiskReserve(path.with_name(f"{path.name}-reserve"))
        try:
            connection = _connect(path, reserve, durable=durable)
            backup_lock = os.open(
                path.with_name(BACKUP_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except (sqlite3.Error, OSError) as error:
            raise _unusable(name, path, str(error)) from error
        database = cls(connection, path, reserve, backup_lock)
        try:
            database.commit(lambda db: _upgrade(db, upgrades), essential=True)
            sync_folder(path.parent)
        except (sqlite3.Error, OSError) as error:
            database.close()
            raise _unusable(name, path, str(error)) from error
        except ServiceError as error:
            database.close()
            raise _unusable(name, path, error.message) from error
        return database

    def close(self) -> None:
        """Close the file; no method may be called afterwards."""
        with self._lock:
            with self._between_backups():
                self._db.close()  # which moves the log to the database
            os.close(self._backup_lock)

    def query(self, statement: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Rows of a SELECT."""
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def commit(self, change: Callable[[sqlite3.Connection], T], *, essential: bool = False) -> T:
        """Run ``change`` as one transaction; it may run twice, the first time without effect.

        Args:
            change: executes statements.
            essential: whether it may take the disk's reserve: for what makes room, and for what
                has happened already.

        Raises:
            ServiceError: STORAGE_FULL when the disk is full.
        """
        with self._lock, self._between_backups():
            try:
                done = self._commit(change)
            except sqlite3.Error as error:
                if not _says_full(error, self._path.parent):
                    raise
                done = self._commit_full(change, essential=essential)
            self._reserve.fill()
            return done

    @contextmanager
    def _between_backups(self) -> Iterator[None]:
        fcntl.flock(self._backup_lock, fcntl.LOCK_SH)
        try:
            yield
        finally:
            fcntl.flock(self._backup_lock, fcntl.LOCK_UN)

    def _commit(self, change: Callable[[sqlite3.Connection], T]) -> T:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            done = change(self._db)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        return done

    def _commit_full(self, change: Callable[[sqlite3.Connection], T], *, essential: bool) -> T:
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        while True:
            try:
                return self._commit(change)
            except sqlite3.Error as error:
                if not _says_full(error, self._path.parent):
                    raise
                if not (essential and self._reserve.give_up_some()):
                    raise ServiceError(
                        Reason.STORAGE_FULL,
                        f"the disk that holds {self._path.name} is full",
                        path=self._path,
                    ) from error

    def sync(self) -> None:
        """Wait until the disk has every commit that was made before the call.

        Commits go to the write-ahead log. What a checkpoint has moved from there is synced by it.
        """
        with suppress(FileNotFoundError):
            fd = os.open(f"{self._path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Execute statements divided by semicolons, inside a transaction as ``executescript`` is not.

    No text in them may have a semicolon.
    """
    for statement in script.split(";"):
        db.execute(statement)


def _connect(path: Path, reserve: DiskReserve, *, durable: bool) -> sqlite3.Connection:
    """Open a connection; on a full disk its log and their index take of the reserve."""
    while True:
        try:
            return _try_to_connect(path, durable=durable)
        except sqlite3.Error as error:
            if not _says_full(error, path.parent) or not reserve.give_up_some():
                raise


def _try_to_connect(path: Path, *, durable: bool) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()  # makes the log
    except sqlite3.Error:
        db.close()
        raise
    return db


def _upgrade(db: sqlite3.Connection, upgrades: Sequence[Upgrade]) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(upgrades):
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"it has version {version}, this build reads {len(upgrades)}",
        )
    for upgrade in upgrades[version:]:
        upgrade(db)
    if version < len(upgrades):
        db.execute(f"PRAGMA user_version = {len(upgrades)}")


def _says_full(error: sqlite3.Error, folder: Path) -> bool:
    code = getattr(error, "sqlite_errorcode", 0)
    if code == sqlite3.SQLITE_FULL:
        return True
    return code & 0xFF in _SYSTEM_ERRORS and probe_full(folder)


def _unusable(name: str, path: Path, why: str) -> ServiceError:
    return ServiceError(Reason.CONFIG_INVALID, f"cannot use the {name} {path}: {why}", path=path)
