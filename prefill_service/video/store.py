"""Stored videos: how they come in, who holds them, and when they go."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.imports import Imports
from prefill_service.video.records import VideoRecord, VideoState
from prefill_service.video.repository import VideoRepository
from prefill_service.video.uploads import Uploads
from prefill_service.video.validation import invalid

log = logging.getLogger("prefill_service.video")

DEFAULT_PAGE = 50
MAX_PAGE = 1000
_NEWEST = 1 << 62


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

    Args:
        decoders: processes started ahead, to look at files.

    Raises:
        ServiceError: CONFIG_INVALID if another process uses the folder, or it or the database
            in it cannot be used.
    """

    def __init__(
        self, storage: StorageConfig, limits: VideoConfig, decoders: DecoderPool | None = None
    ) -> None:
        self._inventory = VideoRepository(storage)
        self._uploads = Uploads(self._inventory, storage, limits, decoders)
        self._imports = Imports(self._inventory, storage)
        self._holds: Counter[str] = Counter()

    async def close(self) -> None:
        """Stop probing and close the catalogue. An interrupted probe can be finished later."""
        await self._uploads.close()
        await asyncio.to_thread(self._inventory.close)

    # ---- coming in --------------------------------------------------------------------

    async def create_upload(
        self, display_name: str, size_bytes: int, sha256: str, request_id: str = ""
    ) -> VideoRecord:
        """Announce a file; returns the upload, or the READY video with the same digest.

        Raises:
            ServiceError: INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED, STORAGE_FULL.
        """
        return await self._uploads.create(display_name, size_bytes, sha256, request_id)

    async def append(self, video_id: str, offset: int, data: bytes) -> int:
        """Add a chunk, whole or not at all; returns the bytes committed.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_OFFSET_MISMATCH (metadata: offset,
                committed_bytes), UPLOAD_SIZE_EXCEEDED, STORAGE_FULL, or the reason the video
                FAILED for.
        """
        return await self._uploads.append(video_id, offset, data)

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
        return await self._uploads.finish(video_id)

    async def import_path(
        self, path: str, display_name: str = "", request_id: str = ""
    ) -> VideoRecord:
        """Take a file of this machine, below an allowed root; returns the READY video.

        Raises:
            ServiceError: PATH_NOT_ALLOWED, INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED,
                STORAGE_FULL, NOT_A_VIDEO and what ``probe_video`` raises.
        """
        video_id = await self._imports.take(path, display_name, request_id)
        return await self.finish(video_id)

    # ---- use --------------------------------------------------------------------------

    async def get(self, video_id: str) -> VideoRecord:
        """One video.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        return await asyncio.to_thread(self._inventory.record, video_id)

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
        return await asyncio.to_thread(self._inventory.page, int(page_token or _NEWEST), count)

    async def touch(self, video_id: str) -> VideoRecord:
        """Move the expiry on, because the video was used.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        await asyncio.to_thread(self._inventory.renew, video_id)
        return await self.get(video_id)

    @contextlib.asynccontextmanager
    async def hold(self, video_id: str) -> AsyncIterator[HeldVideo]:
        """Keep a READY video's files while a job reads them, also if it is deleted meanwhile.

        Raises:
            ServiceError: UNKNOWN_VIDEO, VIDEO_NOT_READY.
        """
        self._inventory.home(video_id)  # what is not an id has no files to let go of
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
            path = self._inventory.input_path(video_id)
            yield HeldVideo(record, path, self._inventory.index_path(video_id))
        finally:
            self._holds[video_id] -= 1
            if not self._holds[video_id]:
                del self._holds[video_id]
            await asyncio.shield(asyncio.to_thread(self._released, video_id))

    def _released(self, video_id: str) -> None:
        self._inventory.renew(video_id)
        with self._inventory.lock(video_id):
            if self._inventory.catalog.get(video_id) is None and not self._holds[video_id]:
                self._inventory.remove_files(video_id)

    async def delete(self, video_id: str) -> None:
        """Remove a video; its files go when the last job lets go of them.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        await asyncio.to_thread(self._inventory.row, video_id)
        await self._uploads.stop_finishing(video_id)
        if not await asyncio.to_thread(self._delete, video_id):
            await asyncio.to_thread(self._inventory.row, video_id)  # another call has: say so

    def _delete(self, video_id: str, only_expired: bool = False) -> bool:
        with self._inventory.lock(video_id):
            row = self._inventory.catalog.get(video_id)
            if only_expired and row and self._inventory.record_of(row).expire_time > time.time():
                return False
            deleted = self._inventory.catalog.delete(video_id)
            if deleted and not self._holds[video_id]:
                self._inventory.remove_files(video_id)
            return deleted

    async def sweep(self) -> Sequence[str]:
        """Remove what has expired and is in nobody's use; returns the ids."""
        removed = []
        for row in await asyncio.to_thread(self._inventory.catalog.all):
            if self._holds[row.video_id] or self._uploads.is_finishing(row.video_id):
                continue
            if await asyncio.to_thread(self._delete, row.video_id, only_expired=True):
                removed.append(row.video_id)
                log.info("video %s (%s) has expired", row.video_id, row.display_name)
        return removed
