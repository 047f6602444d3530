"""Stored videos: how they come in, which are in use, and when they expire."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.paging import check_page
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.indexer import index_video
from prefill_service.video.records import VideoRecord, VideoState
from prefill_service.video.repository import VideoRepository
from prefill_service.video.single_flight import SingleFlight, StoppedError
from prefill_service.video.uploads import Uploads

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HeldVideo:
    """A READY video whose files stay while it is held."""

    record: VideoRecord
    path: Path
    index_path: Path


class VideoStore:
    """Videos below ``data_dir``: ``videos.db`` and ``videos/<video_id>/{input.bin,index.3.npz}``.

    Methods belong to one event loop; blocking work runs in threads, under one lock per video that
    outlives a cancelled caller.
    """

    def __init__(
        self,
        repository: VideoRepository,
        uploads: Uploads,
        limits: VideoConfig,
        decoders: DecoderPool | None = None,
    ) -> None:
        self._repository = repository
        self._uploads = uploads
        self._limits = limits
        self._decoders = decoders
        self._finishing: SingleFlight[VideoRecord] = SingleFlight()
        self._indexing = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0)) // 2))
        self._importing = asyncio.Semaphore(1)
        self._holds: Counter[str] = Counter()

    @classmethod
    def open(
        cls, storage: StorageConfig, limits: VideoConfig, decoders: DecoderPool | None = None
    ) -> VideoStore:
        """Open a data folder, for this process alone.

        Args:
            storage: the folder, and limits of uploads.
            limits: limits of the videos accepted.
            decoders: where to acquire the processes that index files, if not to start them.

        Raises:
            ServiceError: CONFIG_INVALID if another process uses the folder, or it or the database
                in it cannot be used.
        """
        repository = VideoRepository.open(storage)
        return cls(repository, Uploads(repository, storage), limits, decoders)

    async def close(self) -> None:
        """Stop indexing and unlock the folder. An interrupted upload can be finished later."""
        await self._finishing.close()
        await asyncio.to_thread(self._repository.close)

    # ---- coming in --------------------------------------------------------------------

    async def create_upload(
        self,
        display_name: str,
        size_bytes: int,
        sha256: str,
        request_id: str = "",
        *,
        allow_truncated: bool = False,
    ) -> VideoRecord:
        """Announce a file; returns the upload, or the READY video with the same digest.

        Args:
            display_name: for people.
            size_bytes: of the file.
            sha256: of the file.
            request_id: a UUID4, or empty.
            allow_truncated: whether what can be read of a cut file is taken.

        Raises:
            ServiceError: INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED, STORAGE_FULL.
        """
        return await asyncio.to_thread(
            self._uploads.create,
            display_name,
            size_bytes,
            sha256,
            request_id,
            allow_truncated=allow_truncated,
        )

    async def append_chunk(self, video_id: str, offset: int, data: bytes) -> int:
        """Add a chunk, whole or not at all; returns the bytes committed.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_OFFSET_MISMATCH (metadata: offset,
                committed_bytes), UPLOAD_SIZE_EXCEEDED, STORAGE_FULL, or the reason the video
                FAILED for.
        """
        return await asyncio.to_thread(self._uploads.append_chunk, video_id, offset, data)

    async def finish_upload(self, video_id: str) -> VideoRecord:
        """Check size and digest, index, and make the video READY. Idempotent.

        Concurrent calls share the work, which goes on when they are cancelled.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_INCOMPLETE, UPLOAD_DIGEST_MISMATCH (the upload
                starts again at 0), or what ``index_video`` raises (the video is then FAILED
                and its bytes are gone).
        """
        try:
            return await self._finishing.join(video_id, lambda: self._finish(video_id))
        except StoppedError:  # the video was deleted or the store closed
            raise ServiceError(
                Reason.CANCELLED, f"indexing of video {video_id} was stopped"
            ) from None

    async def _finish(self, video_id: str) -> VideoRecord:
        if await asyncio.to_thread(self._uploads.begin_indexing, video_id):
            await self._index(video_id)
        return await asyncio.to_thread(self._repository.get_record, video_id)

    async def _index(self, video_id: str) -> None:
        try:
            async with self._indexing:
                path = self._repository.input_path(video_id)
                row = await asyncio.to_thread(self._repository.get_row, video_id)
                index = await index_video(
                    path, self._limits, self._decoders, allow_truncated=row.allow_truncated
                )
            await asyncio.to_thread(self._uploads.accept, video_id, index)
        except ServiceError as error:
            await asyncio.to_thread(self._uploads.refuse, video_id, error)
            raise
        except BaseException:
            self._uploads.interrupt_indexing(video_id)
            raise

    async def import_video(
        self,
        path: str,
        display_name: str = "",
        request_id: str = "",
        *,
        allow_truncated: bool = False,
    ) -> VideoRecord:
        """Copy a file of this machine, below an allowed root; returns the READY video.

        Raises:
            ServiceError: PATH_NOT_ALLOWED, INVALID_REQUEST, UPLOAD_SIZE_EXCEEDED,
                STORAGE_FULL, NOT_A_VIDEO and what ``index_video`` raises.
        """
        # Imports wait here and not in threads, of which there are few for everybody.
        async with self._importing:
            video_id = await asyncio.to_thread(
                self._uploads.import_file,
                path,
                display_name,
                request_id,
                allow_truncated=allow_truncated,
            )
        return await self.finish_upload(video_id)

    # ---- use --------------------------------------------------------------------------

    async def get_video(self, video_id: str) -> VideoRecord:
        """One video; ``committed_bytes`` is where an upload goes on.

        Raises:
            ServiceError: UNKNOWN_VIDEO.
        """
        return await asyncio.to_thread(self._repository.get_record, video_id)

    async def list_videos(
        self, page_size: int = 0, page_token: str = ""
    ) -> tuple[Sequence[VideoRecord], str]:
        """One page, newest first, and the token of the next one ("" on the last).

        Args:
            page_size: 0 means 50; more than 1000 is taken as 1000.
            page_token: from the page before.

        Raises:
            ServiceError: INVALID_REQUEST.
        """
        count, before = check_page(page_size, page_token)
        return await asyncio.to_thread(self._repository.list_records, before, count)

    @contextlib.asynccontextmanager
    async def hold_video(self, video_id: str) -> AsyncIterator[HeldVideo]:
        """Keep a READY video's files while a job reads them, also if it is deleted meanwhile.

        Its expiry moves on when the hold begins and when it ends.

        Raises:
            ServiceError: UNKNOWN_VIDEO, VIDEO_NOT_READY.
        """
        path = self._repository.input_path(video_id)  # refuses what is not an id
        self._holds[video_id] += 1  # before looking, so that no sweep comes in between
        try:
            await asyncio.to_thread(self._repository.extend_expiry, video_id)
            record = await self.get_video(video_id)
            if record.state is not VideoState.READY:
                raise ServiceError(
                    Reason.VIDEO_NOT_READY,
                    f"video {video_id} is {record.state}, not READY",
                    video_id=video_id,
                    state=record.state,
                )
            yield HeldVideo(record, path, self._repository.index_path(video_id))
        finally:
            self._holds[video_id] -= 1
            if not self._holds[video_id]:
                del self._holds[video_id]
            await asyncio.shield(asyncio.to_thread(self._end_hold, video_id))

    def _end_hold(self, video_id: str) -> None:
        self._repository.extend_expiry(video_id)
        with self._repository.lock(video_id):
            gone = self._repository.database.find_video(video_id) is None
            if gone and not self._holds[video_id]:
                self._repository.remove_files(video_id)

    async def delete_video(self, video_id: str) -> None:
        """Remove a video; its files go when the last job that holds them ends.

        It works on a full disk.

        Raises:
            ServiceError: UNKNOWN_VIDEO; STORAGE_FULL if jobs hold the video, the disk is full and
                its reserve is used up.
        """
        await asyncio.to_thread(self._repository.get_row, video_id)
        await self._finishing.stop(video_id)
        if not await asyncio.to_thread(self._delete, video_id):
            # Another call has deleted it: that raises UNKNOWN_VIDEO.
            await asyncio.to_thread(self._repository.get_row, video_id)

    def _delete(self, video_id: str, only_expired: bool = False) -> bool:
        repository = self._repository
        database = repository.database
        with repository.lock(video_id):
            row = database.find_video(video_id)
            if row is None:
                return False
            if only_expired and repository.make_record(row).expire_time > time.time():
                return False
            # Before looking for holds: who begins one afterwards does not find the video.
            database.hide_video(video_id)
            if not self._holds[video_id]:
                repository.delete_video(video_id)
                return True
            try:
                return database.delete_video(video_id)  # its files go when the last hold ends
            finally:
                database.unhide_video(video_id)

    async def delete_expired(self) -> Sequence[str]:
        """Remove the videos that have expired and that nobody uses; returns their ids.

        Rows of deleted videos that had no room to be removed go as well, if they can now.
        """
        await asyncio.to_thread(self._repository.finish_deletions)
        removed = []
        for row in await asyncio.to_thread(self._repository.database.list_all):
            if self._holds[row.video_id] or self._finishing.is_running(row.video_id):
                continue
            if await asyncio.to_thread(self._delete, row.video_id, only_expired=True):
                removed.append(row.video_id)
                logger.info("video %s (%s) has expired", row.video_id, row.display_name)
        return removed
