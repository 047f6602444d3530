"""Uploads: announced, received in chunks, checked, and probed until the video is READY."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video import files
from prefill_service.video.database import Row
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.probe import probe_video
from prefill_service.video.records import VideoInfo, VideoRecord, VideoState
from prefill_service.video.repository import VideoRepository
from prefill_service.video.validation import check_name, check_request_id, check_size, invalid

log = logging.getLogger("prefill_service.video")

# Not the file's fault: its bytes are kept and it can be finished again.
_RETRIABLE = (Reason.INTERNAL, Reason.STORAGE_FULL)


class Uploads:
    """The way of a file from its announcement to a READY (or FAILED) video of the inventory.

    ``VideoStore`` documents what the calls raise.
    """

    def __init__(
        self,
        inventory: VideoRepository,
        storage: StorageConfig,
        limits: VideoConfig,
        decoders: DecoderPool | None,
    ) -> None:
        self._inventory, self._decoders = inventory, decoders
        self._storage = storage
        self._limits = limits
        self._finishing: dict[str, asyncio.Task[VideoRecord]] = {}
        self._probing = asyncio.Semaphore(max(1, len(os.sched_getaffinity(0)) // 2))

    async def close(self) -> None:
        """Stop probing. An interrupted probe can be finished later."""
        tasks = list(self._finishing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- receiving --------------------------------------------------------------------

    async def create(
        self, display_name: str, size_bytes: int, sha256: str, request_id: str
    ) -> VideoRecord:
        """Announce a file; returns the upload, or the READY video with the same digest."""
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
        inventory = self._inventory
        arguments = json.dumps(["upload", display_name, size_bytes, sha256])
        with inventory.lock("create"):  # two equal requests at once make one video
            row = inventory.answered(request_id, arguments)
            row = row or inventory.catalog.ready_with_digest(sha256)
            if row is None:
                files.check_space(inventory.folder, size_bytes, self._storage.min_free_bytes)
                row = inventory.insert(display_name, size_bytes, sha256)
            else:
                inventory.renew(row.video_id)
            if request_id:
                inventory.catalog.remember(request_id, arguments, row.video_id)
        return inventory.record(row.video_id)

    async def append(self, video_id: str, offset: int, data: bytes) -> int:
        """Add a chunk, whole or not at all; returns the bytes committed."""
        return await asyncio.to_thread(self._append, video_id, offset, data)

    def _append(self, video_id: str, offset: int, data: bytes) -> int:
        self._inventory.row(video_id)  # only known videos get a lock
        with self._inventory.lock(video_id):
            row = self._inventory.row(video_id)
            _raise_if_failed(row)
            path, free = self._inventory.input_path(video_id), self._storage.min_free_bytes
            return files.append(path, offset, data, row.size_bytes, free)

    # ---- checking and probing ---------------------------------------------------------

    async def finish(self, video_id: str) -> VideoRecord:
        """Check size and digest, probe, and make the video READY. Idempotent.

        Concurrent calls share the work, which goes on when they are cancelled.
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

    def is_finishing(self, video_id: str) -> bool:
        """Whether a video is being checked or probed."""
        return video_id in self._finishing

    async def stop_finishing(self, video_id: str) -> None:
        """End a probe, because the video is to be deleted."""
        task = self._finishing.get(video_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _finished(self, video_id: str, task: asyncio.Task[VideoRecord]) -> None:
        self._finishing.pop(video_id, None)
        if not task.cancelled():
            task.exception()  # every caller may be gone; asyncio must not complain

    async def _finish(self, video_id: str) -> VideoRecord:
        row = await asyncio.to_thread(self._begin_probe, video_id)
        if row.state is VideoState.PROBING:
            await self._probe(video_id)
        return await asyncio.to_thread(self._inventory.record, video_id)

    def _begin_probe(self, video_id: str) -> Row:
        """Check what was received; the row is PROBING afterwards unless it was READY."""
        self._inventory.row(video_id)  # only known videos get a lock
        with self._inventory.lock(video_id):
            row = self._inventory.row(video_id)
            _raise_if_failed(row)
            if row.state is VideoState.READY:
                return row
            path = self._inventory.input_path(video_id)
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
            self._inventory.catalog.set_state(video_id, VideoState.PROBING)
        return self._inventory.row(video_id)

    async def _probe(self, video_id: str) -> None:
        inventory = self._inventory
        try:
            async with self._probing:
                index = await probe_video(
                    inventory.input_path(video_id), self._limits, self._decoders
                )
            await asyncio.to_thread(files.save_index, index, inventory.index_path(video_id))
            info, ready = VideoInfo.of(index), VideoState.READY
            await asyncio.to_thread(inventory.catalog.set_state, video_id, ready, info=info)
            await asyncio.to_thread(inventory.renew, video_id)
            log.info("video %s is ready: %s", video_id, info)
        except ServiceError as error:
            await asyncio.to_thread(self._refuse, video_id, error)
            raise
        except BaseException:
            inventory.catalog.set_state(video_id, VideoState.UPLOADING)
            raise

    def _refuse(self, video_id: str, error: ServiceError) -> None:
        if error.reason in _RETRIABLE:
            self._inventory.catalog.set_state(video_id, VideoState.UPLOADING)
            return
        log.warning("video %s is refused: %s", video_id, error)
        self._inventory.catalog.set_state(video_id, VideoState.FAILED, error=error)
        self._inventory.input_path(video_id).unlink(missing_ok=True)


def _raise_if_failed(row: Row) -> None:
    if row.state is VideoState.FAILED:
        reason = Reason(row.error_reason)
        raise ServiceError(reason, row.error_message, video_id=row.video_id)
