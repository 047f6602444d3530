"""The bytes of stored videos. Blocking; callers hold the video's lock.

Chunks are written without fsync. A crash of the service loses nothing, since the kernel has the
pages; after a power cut the file is shorter, and the client resumes at its length. The one fsync is
in ``sync_and_digest``, before a video can become READY: the sha256 of the bytes on disk decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from prefill_service.errors import Reason, ServiceError
from prefill_service.storage.disk_space import (
    copy_bytes,
    is_full,
    make_folders,
    sync_folder,
)
from prefill_service.video.index import VideoIndex


def lock_data_dir(root: Path, videos_dir: Path) -> int:
    """Make both folders and lock ``root`` for this process; returns the lock's descriptor.

    Raises:
        ServiceError: CONFIG_INVALID.
    """
    try:
        make_folders(videos_dir)
        fd = os.open(root / "videos.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"storage.data_dir {root} cannot be used: {error.strerror}",
            name="storage.data_dir",
            value=root,
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ServiceError(
            Reason.CONFIG_INVALID,
            f"storage.data_dir {root} is in use by another prefill-service",
            name="storage.data_dir",
            value=root,
        ) from error
    return fd


def committed_bytes(path: Path) -> int:
    """Size of the file in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def check_space(folder: Path, needed: int, min_free_bytes: int) -> None:
    """Raise STORAGE_FULL if ``needed`` more bytes would leave less than ``min_free_bytes``."""
    free = shutil.disk_usage(folder).free
    if free - needed < min_free_bytes:
        raise ServiceError(
            Reason.STORAGE_FULL,
            f"{needed} bytes do not fit: {free} bytes are free on the disk and "
            f"{min_free_bytes} must stay free; what was received before is kept",
            needed_bytes=needed,
            free_bytes=free,
            min_free_bytes=min_free_bytes,
        )


def append_chunk(
    path: Path, offset: int, data: bytes, *, size_bytes: int, min_free_bytes: int
) -> int:
    """Write ``data`` at the end of the file, whole or not at all; returns its new size.

    Args:
        path: the file; made if there is none.
        offset: where the sender believes that the file ends.
        data: the chunk.
        size_bytes: size of the whole file as announced.
        min_free_bytes: space that must stay free on the disk.

    Raises:
        ServiceError: UPLOAD_OFFSET_MISMATCH, UPLOAD_SIZE_EXCEEDED, STORAGE_FULL.
    """
    size = committed_bytes(path)
    if offset != size:
        raise ServiceError(
            Reason.UPLOAD_OFFSET_MISMATCH,
            f"the chunk starts at offset {offset}, but {size} bytes are committed",
            offset=offset,
            committed_bytes=size,
        )
    if offset + len(data) > size_bytes:
        raise ServiceError(
            Reason.UPLOAD_SIZE_EXCEEDED,
            f"the chunk ends at byte {offset + len(data)}, but {size_bytes} were announced",
            end=offset + len(data),
            size_bytes=size_bytes,
        )
    check_space(path.parent, len(data), min_free_bytes)
    with storage_errors():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with storage_errors():
            _write(fd, offset, data)
    finally:
        os.close(fd)
    return offset + len(data)


def _write(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(fd, view, offset + len(data) - len(view))
            view = view[written:]
    except OSError:
        os.ftruncate(fd, offset)  # half a chunk must not count as committed
        raise


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Raise STORAGE_FULL for the errors of a full disk."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise ServiceError(
            Reason.STORAGE_FULL,
            f"the disk is full ({error.strerror}); what was received before is kept",
        ) from error


def make_folder(path: Path) -> None:
    """Make a video's folder, so that a power cut does not lose what will be synced in it.

    Raises:
        ServiceError: STORAGE_FULL.
    """
    with storage_errors():
        path.mkdir()
        sync_folder(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a video's folder; a power cut does not bring it back."""
    shutil.rmtree(path, ignore_errors=True)
    sync_folder(path.parent)


def sync_and_digest(path: Path) -> str:
    """Sync the file to disk; returns its sha256, lower-case hexadecimal."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_index(index: VideoIndex, path: Path) -> None:
    """Write an index and sync it, and the folder that lists it and the video, to disk.

    Raises:
        ServiceError: STORAGE_FULL; nothing of the index is left then.
    """
    try:
        with storage_errors():
            index.save(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def discard_bytes(path: Path) -> None:
    """Empty the file: the upload starts again at 0."""
    os.truncate(path, 0)


def open_import(path: Path, roots: list[Path]) -> int:
    """Open a file for import, after all symlinks, below one of ``roots``.

    Raises:
        ServiceError: PATH_NOT_ALLOWED, NOT_A_VIDEO.
    """
    fd = -1
    # O_NONBLOCK: opening a FIFO must not wait for its writer.
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    # What was opened counts, not what the path meant a moment ago.
    real = Path(os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else os.path.realpath(path))
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        if fd >= 0:
            os.close(fd)
        allowed = ", ".join(map(str, roots)) or "none"
        raise ServiceError(
            Reason.PATH_NOT_ALLOWED,
            f"{path} is not below a folder videos may be imported from ({allowed})",
            path=path,
            import_roots=allowed,
        )
    if fd < 0 or not os.path.isfile(f"/proc/self/fd/{fd}"):
        if fd >= 0:
            os.close(fd)
        raise ServiceError(Reason.NOT_A_VIDEO, f"{path} is not a file that can be read", path=path)
    return fd


def copy_import(fd: int, target: Path, min_free_bytes: int) -> None:
    """Copy the open file to ``target``; file systems that can share the blocks do.

    Not a hard link: who owns the original could still write into it, and the stored bytes
    would no longer be those of the digest.

    Raises:
        ServiceError: STORAGE_FULL.
    """
    check_space(target.parent, os.fstat(fd).st_size, min_free_bytes)
    with storage_errors(), target.open("xb", buffering=0) as out:
        copy_bytes(fd, out.fileno())
