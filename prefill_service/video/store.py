"""Stored videos: resumable upload, probing, expiry, and holds of the jobs that read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.ids import is_id, new_id
from prefill_service.video import files
from prefill_service.video.arguments import check_name, check_request_id, check_size, invalid
from prefill_service.video.catalog import Catalog, Row
from prefill_service.video.probe import probe_video
from prefill_service.video.records import VideoInfo, VideoRecord, VideoState

log = logging.getLogger("prefill_service.video")

DEFAULT_PAGE = 50
MAX_PAGE = 1000
_NEWEST = 1 << 62
# Not the file's fault: its bytes are kept and it can be finished again.
_RETRIABLE = (Reason.INTERNAL, Reason.STORAGE_FULL)


@dataclass(frozen=True, slots=True)
class HeldVideo:
    """A READY video whose files stay while it is held."""

    record: VideoRecord
    path: Path
    index_path: Path


class VideoStore:
    """Videos below ``data_dir``: ``videos.db`` and ``videos/<video_id>/{input.bin,index.npz}``.

    One process at a time may use a data folder. Methods belong to one event loop; blocking
    work runs in threads, under one lock per video that outlives a cancelled caller.

    Raises:
        ServiceError: CONFIG_INVALID if another process uses the folder, or it or the database
            in it cannot be used.
    """

    def __init__(self, storage: StorageConfig, limits: VideoConfig) -> None:
        self._storage = storage
        self._limits = limits
        root = Path(storage.data_dir).expanduser()
        self._folder = root / "videos"
        self._lock_fd = files.claim(root, self._folder)
        try:
            self._catalog = Catalog(root / "videos.db")
        except ServiceError:
            os.close(self._lock_fd)
            raise
        self._locks: dict[str, threading.Lock] = {}
        self._holds: Counter[str] = Counter()
        self._finishing: dict[str, asyncio.Task[VideoRecord]] = {}
        self._importing = asyncio.Semaphore(1)
        self._probing = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0)) // 2))
        self._recover()

    def _recover(self) -> None:
        """Take up what a former process left: unfinished probes and half-deleted folders."""
        for row in self._catalog.all():
            if row.state is VideoState.PROBING:
                self._catalog.set_state(row.video_id, VideoState.UPLOADING)
            elif row.state is VideoState.READY and not (
                self._input(row.video_id).exists() and self._index(row.video_id).exists()
            ):
                log.error("the files of video %s are gone; the video is removed", row.video_id)
                self._catalog.delete(row.video_id)
        known = {row.video_id for row in self._catalog.all()}
        for folder in self._folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """Stop probing and close the catalogue. An interrupted probe can be finished later."""
        tasks = list(self._finishing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._catalog.close)
        os.close(self._lock_fd)

    # ---- paths, rows, records ---------------------------------------------------------

    def _home(self, video_id: str) -> Path:
        """A video's folder; ids come from clients, and ``../..`` is not one."""
        if not is_id("vid", video_id):
            raise _unknown(video_id)
        return self._folder / video_id

    def _input(self, video_id: str) -> Path:
        return self._home(video_id) / "input.bin"

    def _index(self, video_id: str) -> Path:
        return self._home(video_id) / "index.npz"

    def _lock(self, video_id: str) -> threading.Lock:
        return self._locks.setdefault(video_id, threading.Lock())

    def _expiry(self) -> float:
        return time.time() + self._storage.expire_hours * 3600

    def _row(self, video_id: str) -> Row:
        row = self._catalog.get(video_id)
        if row is None:
            raise _unknown(video_id)
        return row

    def _record(self, row: Row) -> VideoRecord:
        committed, expire_time = row.size_bytes, row.expire_time
        if row.state is VideoState.FAILED:
            committed = 0
        elif row.state is VideoState.UPLOADING:
            committed = files.committed(self._input(row.video_id))
            # A running upload does not expire, however long it takes.
            with contextlib.suppress(FileNotFoundError):
                touched = self._input(row.video_id).stat().st_mtime
                expire_time = max(expire_time, touched + self._storage.expire_hours * 3600)
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

    def _answered(self, request_id: str, arguments: str) -> Row | None:
        """The video that the first request with this id has led to."""
        if not request_id:
            return None
        known = self._catalog.answered(request_id)
        if known is None:
            return None
        if known[0] != arguments:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"request_id {request_id} was used before with other arguments",
                field="request_id",
                value=request_id,
            )
        return self._catalog.get(known[1])

    # ---- upload -----------------------------------------------------------------------

    async def create_upload(
        self, display_name: str, size_bytes: int, sha256: str, request_id: str = ""
    ) -> VideoRecord:
        """Announce a file; returns the upload, or the READY video with the same digest.

        Raises:
            ServiceError: INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED, STORAGE_FULL.
        """
        sha256 = sha256.lower()
        check_name(display_name)
        check_size(size_bytes, self._storage.max_upload_bytes)
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise invalid("sha256", sha256, "64 hexadecimal digits")
        check_request_id(request_id)
        return await asyncio.to_thread(self._create, display_name, size_bytes, sha256, request_id)

    def _create(
        self, display_name: str, size_bytes: int, sha256: str, request_id: str
    ) -> VideoRecord:
        arguments = json.dumps(["upload", display_name, size_bytes, sha256])
        with self._lock("create"):  # two equal requests at once make one video
            row = self._answered(request_id, arguments)
            row = row or self._catalog.ready_with_digest(sha256)
            if row is None:
                files.check_space(self._folder, size_bytes, self._storage.min_free_bytes)
                row = self._insert(display_name, size_bytes, sha256)
            else:
                self._catalog.set_expiry(row.video_id, self._expiry())
            if request_id:
                self._catalog.remember(request_id, arguments, row.video_id)
        return self._record(self._row(row.video_id))

    def _insert(self, display_name: str, size_bytes: int, sha256: str) -> Row:
        video_id = new_id("vid")
        self._input(video_id).parent.mkdir()
        now = time.time()
        self._catalog.insert(video_id, display_name, size_bytes, sha256, now, self._expiry())
        return self._row(video_id)

    async def append(self, video_id: str, offset: int, data: bytes) -> int:
        """Add a chunk, whole or not at all; returns the bytes committed.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_OFFSET_MISMATCH (metadata: offset,
                committed_bytes), UPLOAD_SIZE_EXCEEDED, STORAGE_FULL, or the reason the video
                FAILED for.
        """
        return await asyncio.to_thread(self._append, video_id, offset, data)

    def _append(self, video_id: str, offset: int, data: bytes) -> int:
        self._row(video_id)  # only known videos get a lock
        with self._lock(video_id):
            row = self._row(video_id)
            _raise_if_failed(row)
            path, free = self._input(video_id), self._storage.min_free_bytes
            return files.append(path, offset, data, row.size_bytes, free)

    async def status(self, video_id: str) -> VideoRecord:
        """The record; ``committed_bytes`` is where an upload goes on.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        return await self.get(video_id)

    async def finish(self, video_id: str) -> VideoRecord:
        """Check size and digest, probe, and make the video READY. Idempotent.

        Concurrent calls share the work, which goes on when they are cancelled.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_INCOMPLETE, UPLOAD_DIGEST_MISMATCH (the upload
                starts again at 0), or what ``probe_video`` raises (the video is then FAILED
                and its bytes are gone).
        """
        task = self._finishing.get(video_id)
        if task is None:
            task = asyncio.create_task(self._finish(video_id))
            self._finishing[video_id] = task
            task.add_done_callback(lambda done: self._finished(video_id, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not the caller: the video was deleted or the store closed
                raise ServiceError(
                    Reason.CANCELLED, f"probing of video {video_id} was stopped"
                ) from None
            raise

    def _finished(self, video_id: str, task: asyncio.Task[VideoRecord]) -> None:
        self._finishing.pop(video_id, None)
        if not task.cancelled():
            task.exception()  # every caller may be gone; asyncio must not complain

    async def _finish(self, video_id: str) -> VideoRecord:
        row = await asyncio.to_thread(self._begin_probe, video_id)
        if row.state is VideoState.PROBING:
            await self._probe(video_id)
        return await self.get(video_id)

    def _begin_probe(self, video_id: str) -> Row:
        """Check what was received; the row is PROBING afterwards unless it was READY."""
        self._row(video_id)  # only known videos get a lock
        with self._lock(video_id):
            row = self._row(video_id)
            _raise_if_failed(row)
            if row.state is VideoState.READY:
                return row
            path = self._input(video_id)
            committed = files.committed(path)
            if committed != row.size_bytes:
                raise ServiceError(
                    Reason.UPLOAD_INCOMPLETE,
                    f"{committed} of {row.size_bytes} bytes have been received",
                    committed_bytes=committed,
                    size_bytes=row.size_bytes,
                )
            digest = files.settle(path)
            if digest != row.sha256:
                files.empty(path)
                raise ServiceError(
                    Reason.UPLOAD_DIGEST_MISMATCH,
                    f"the bytes received have sha256 {digest}, announced was {row.sha256}; "
                    "the upload starts again at 0",
                    sha256=digest,
                    announced_sha256=row.sha256,
                )
            self._catalog.set_state(video_id, VideoState.PROBING)
        return self._row(video_id)

    async def _probe(self, video_id: str) -> None:
        path = self._input(video_id)
        try:
            async with self._probing:
                index = await probe_video(path, self._limits)
            await asyncio.to_thread(files.save_index, index, self._index(video_id))
            info = VideoInfo.of(index)
            await asyncio.to_thread(self._catalog.set_state, video_id, VideoState.READY, info=info)
            await asyncio.to_thread(self._catalog.set_expiry, video_id, self._expiry())
            log.info("video %s is ready: %s", video_id, info)
        except ServiceError as error:
            await asyncio.to_thread(self._refuse, video_id, error)
            raise
        except BaseException:
            self._catalog.set_state(video_id, VideoState.UPLOADING)
            raise

    def _refuse(self, video_id: str, error: ServiceError) -> None:
        if error.reason in _RETRIABLE:
            self._catalog.set_state(video_id, VideoState.UPLOADING)
            return
        log.warning("video %s is refused: %s", video_id, error)
        self._catalog.set_state(video_id, VideoState.FAILED, error=error)
        self._input(video_id).unlink(missing_ok=True)

    # ---- import -----------------------------------------------------------------------

    async def import_path(
        self, path: str, display_name: str = "", request_id: str = ""
    ) -> VideoRecord:
        """Take a file of this machine, below an allowed root; returns the READY video.

        Raises:
            ServiceError: PATH_NOT_ALLOWED, INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED,
                STORAGE_FULL, NOT_A_VIDEO and what ``probe_video`` raises.
        """
        name = display_name or os.path.basename(path)
        check_name(name)
        check_request_id(request_id)
        if not os.path.isabs(path) or "\0" in path:
            raise invalid("path", path, "an absolute path")
        # Waiting here and not for the lock: waiting threads would be lacking to everybody else.
        async with self._importing:
            video_id = await asyncio.to_thread(self._import, path, name, request_id)
        return await self.finish(video_id)

    def _import(self, path: str, name: str, request_id: str) -> str:
        arguments = json.dumps(["import", name, path])
        with self._lock("import"), contextlib.ExitStack() as stack:
            known = self._answered(request_id, arguments)
            if known is not None:
                return known.video_id
            roots = [Path(root).expanduser() for root in self._storage.import_roots]
            fd = files.open_import(Path(path), roots)
            stack.callback(os.close, fd)
            size = os.fstat(fd).st_size
            check_size(size, self._storage.max_upload_bytes)
            digest = files.settle(Path(f"/proc/self/fd/{fd}"))
            row = self._catalog.ready_with_digest(digest)
            if row is None:
                row = self._insert(name, size, digest)
                try:
                    files.copy_import(fd, self._input(row.video_id), self._storage.min_free_bytes)
                except BaseException:
                    self._catalog.delete(row.video_id)
                    self._remove_files(row.video_id)
                    raise
            else:
                self._catalog.set_expiry(row.video_id, self._expiry())
            if request_id:
                self._catalog.remember(request_id, arguments, row.video_id)
            return row.video_id

    # ---- use --------------------------------------------------------------------------

    async def get(self, video_id: str) -> VideoRecord:
        """One video.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        return await asyncio.to_thread(lambda: self._record(self._row(video_id)))

    async def list(
        self, page_size: int = 0, page_token: str = ""
    ) -> tuple[Sequence[VideoRecord], str]:
        """One page, newest first, and the token of the next one ("" on the last).

        Args:
            page_size: 0 means 50; more than 1000 is taken as 1000.
            page_token: from the page before.

        Raises:
            ServiceError: INVALID_REQUEST.
        """
        if page_size < 0:
            raise invalid("page_size", page_size, f"0 to {MAX_PAGE}")
        if page_token and not re.fullmatch("[0-9]{1,18}", page_token):
            raise invalid("page_token", page_token, "the next_page_token of a page before")
        count = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        return await asyncio.to_thread(self._page, int(page_token or _NEWEST), count)

    def _page(self, before: int, count: int) -> tuple[Sequence[VideoRecord], str]:
        rows = self._catalog.page(before, count + 1)
        token = str(rows[count - 1].seq) if len(rows) > count else ""
        return [self._record(row) for row in rows[:count]], token

    async def touch(self, video_id: str) -> VideoRecord:
        """Move the expiry on, because the video was used.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        await asyncio.to_thread(self._catalog.set_expiry, video_id, self._expiry())
        return await self.get(video_id)

    @contextlib.asynccontextmanager
    async def hold(self, video_id: str) -> AsyncIterator[HeldVideo]:
        """Keep a READY video's files while a job reads them, also if it is deleted meanwhile.

        Raises:
            ServiceError: UNKNOWN_VIDEO, VIDEO_NOT_READY.
        """
        self._home(video_id)  # what is not an id has no files to let go of
        self._holds[video_id] += 1  # before looking, so that no sweep comes in between
        try:
            record = await self.touch(video_id)
            if record.state is not VideoState.READY:
                raise ServiceError(
                    Reason.VIDEO_NOT_READY,
                    f"video {video_id} is {record.state}, not READY",
                    video_id=video_id,
                    state=record.state,
                )
            yield HeldVideo(record, self._input(video_id), self._index(video_id))
        finally:
            self._holds[video_id] -= 1
            if not self._holds[video_id]:
                del self._holds[video_id]
            await asyncio.shield(asyncio.to_thread(self._released, video_id))

    def _released(self, video_id: str) -> None:
        self._catalog.set_expiry(video_id, self._expiry())
        with self._lock(video_id):
            if self._catalog.get(video_id) is None and not self._holds[video_id]:
                self._remove_files(video_id)

    async def delete(self, video_id: str) -> None:
        """Remove a video; its files go when the last job lets go of them.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        await asyncio.to_thread(self._row, video_id)
        task = self._finishing.get(video_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if not await asyncio.to_thread(self._delete, video_id):
            await asyncio.to_thread(self._row, video_id)  # another call has: say so

    def _delete(self, video_id: str, only_expired: bool = False) -> bool:
        with self._lock(video_id):
            row = self._catalog.get(video_id)
            if only_expired and row and self._record(row).expire_time > time.time():
                return False
            deleted = self._catalog.delete(video_id)
            if deleted and not self._holds[video_id]:
                self._remove_files(video_id)
            return deleted

    def _remove_files(self, video_id: str) -> None:
        shutil.rmtree(self._home(video_id), ignore_errors=True)
        self._locks.pop(video_id, None)

    async def sweep(self) -> Sequence[str]:
        """Remove what has expired and is in nobody's use; returns the ids."""
        removed = []
        for row in await asyncio.to_thread(self._catalog.all):
            if self._holds[row.video_id] or row.video_id in self._finishing:
                continue
            if await asyncio.to_thread(self._delete, row.video_id, only_expired=True):
                removed.append(row.video_id)
                log.info("video %s (%s) has expired", row.video_id, row.display_name)
        return removed


def _unknown(video_id: str) -> ServiceError:
    return ServiceError(Reason.UNKNOWN_VIDEO, f"there is no video {video_id!r}", video_id=video_id)


def _raise_if_failed(row: Row) -> None:
    if row.state is VideoState.FAILED:
        reason = Reason(row.error_reason)
        raise ServiceError(reason, row.error_message, video_id=row.video_id)
