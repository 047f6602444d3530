"""Full disks: which errors they are, and space that is kept for the writes that must succeed."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, no quota, and a file larger than the process or the file system may write."""

_CANNOT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of file systems that have no such thing for folders."""

_CANNOT_SHARE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Of pairs of file systems between which the kernel does not copy."""

RESERVE_BYTES = 512 << 10
_COPY_BYTES = 1 << 20
_STEP_BYTES = 64 << 10
_PROBE_BYTES = 4096


def is_full(error: BaseException) -> bool:
    """Whether an error of the system says that a disk is full."""
    return isinstance(error, OSError) and error.errno in FULL_ERRNOS


def probe_full(folder: Path) -> bool:
    """Whether a small file cannot be written to a folder because its disk is full."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
    except OSError as error:
        return is_full(error)
    return False


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, as ``fsync`` of a file does its bytes."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(fd)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, so that a power cut leaves them.

    Raises:
        OSError: one cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        with contextlib.suppress(PermissionError):  # it may be written but not read
            sync_folder(folder.parent)


def copy_bytes(source: int, target: int) -> None:
    """Copy an open file from its position to another; file systems that can share blocks do.

    Raises:
        OSError: the disk is full, or another error of the system.
    """
    try:
        while os.copy_file_range(source, target, _COPY_BYTES):
            pass
    except OSError as error:
        if error.errno not in _CANNOT_SHARE:
            raise
        while block := os.read(source, _COPY_BYTES):
            view = memoryview(block)
            while view:
                view = view[os.write(target, view) :]


class DiskReserve:
    """A file that takes space as long as there is some, and gives it up when there is none.

    Its bytes are random, so that no file system stores them in less space than they have. It stays
    over restarts: a disk may be full at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._filled = False

    def fill(self) -> None:
        """Take the space, if it is not taken and the disk has twice as much."""
        if self._filled:
            return
        try:
            if self._num_bytes() < RESERVE_BYTES:
                if shutil.disk_usage(self._path.parent).free < 2 * RESERVE_BYTES:
                    return  # others need it more
                self._path.write_bytes(os.urandom(RESERVE_BYTES))
            self._filled = True
        except OSError as error:
            logger.warning("no disk space can be kept in reserve: %s", error)

    def give_up_some(self) -> bool:
        """Give up a part, little enough to leave some for the next; ``False`` if nothing is left.

        What is given up may be taken by others before it can be used.
        """
        num_bytes = self._num_bytes()
        if num_bytes == 0:
            return False
        self._filled = False
        os.truncate(self._path, max(0, num_bytes - _STEP_BYTES))
        return True

    def _num_bytes(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0
