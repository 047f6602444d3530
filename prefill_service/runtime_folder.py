"""The folder of a running service's sockets and temporary files, and what dead services left.

A process that is killed cannot remove its folder. So each folder is locked by the process that it
belongs to, and whoever starts next removes the folders that nobody has locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.group_memory import remove_listed_memory

logger = logging.getLogger(__name__)

PREFIX = "prefill-run-"
"""Only folders with locks have it: those of releases that lock nothing may be in use."""

_LONGEST_PARENT = 36
"""Paths of Unix sockets end at 107 characters, and vLLM's own take 37 after a folder."""


class RuntimeFolder:
    """A private folder with a short path, made by ``create``.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> RuntimeFolder:
        """Make and lock a folder for this process, and remove those of processes that are dead.

        Raises:
            ServiceError: CONFIG_INVALID if the temporary folder cannot be written to.
        """
        parent = tempfile.gettempdir()
        if len(parent) > _LONGEST_PARENT:
            parent = "/tmp"
        _remove_abandoned(Path(parent))
        try:
            while True:
                path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                lock = _lock_folder(path)
                if lock is not None:
                    return cls(path, lock)
        except OSError as error:
            raise ServiceError(
                Reason.CONFIG_INVALID,
                f"the temporary folder {parent} cannot be used: {error.strerror}",
                path=parent,
            ) from error

    def remove(self) -> None:
        """Remove the folder with all that is in it, then unlock it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user that no living process has locked."""
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = _lock_folder(path)
            if lock is not None:
                for folder in path.iterdir():
                    remove_listed_memory(folder)
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
                logger.info("removed %s, which a service that was killed had left", path)


def _lock_folder(path: Path) -> int | None:
    """Lock a folder; returns the lock's descriptor, ``None`` if another process was first.

    The kernel lets go of the lock when the process ends, however it ends.
    """
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between its making and its locking, another start may have taken it for abandoned.
        if os.path.samestat(os.fstat(lock), os.stat(path)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None
