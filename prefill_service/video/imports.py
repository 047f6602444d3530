"""Imports: files of this machine, taken as uploads that are complete."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path

from prefill_service.config import StorageConfig
from prefill_service.video import files
from prefill_service.video.repository import VideoRepository
from prefill_service.video.validation import check_name, check_request_id, check_size, invalid


class Imports:
    """Copies files below the allowed roots into the inventory, one at a time."""

    def __init__(self, inventory: VideoRepository, storage: StorageConfig) -> None:
        self._inventory = inventory
        self._storage = storage
        self._importing = asyncio.Semaphore(1)

    async def take(self, path: str, display_name: str, request_id: str) -> str:
        """Copy a file, unless a READY video has its digest; returns the video to finish."""
        name = display_name or os.path.basename(path)
        check_name(name)
        check_request_id(request_id)
        if not os.path.isabs(path) or "\0" in path:
            raise invalid("path", path, "an absolute path")
        # Waiting here and not for the lock: waiting threads would be lacking to everybody else.
        async with self._importing:
            return await asyncio.to_thread(self._take, path, name, request_id)

    def _take(self, path: str, name: str, request_id: str) -> str:
        inventory = self._inventory
        arguments = json.dumps(["import", name, path])
        with inventory.lock("import"), contextlib.ExitStack() as stack:
            known = inventory.answered(request_id, arguments)
            if known is not None:
                return known.video_id
            roots = [Path(root).expanduser() for root in self._storage.import_roots]
            fd = files.open_import(Path(path), roots)
            stack.callback(os.close, fd)
            size = os.fstat(fd).st_size
            check_size(size, self._storage.max_upload_bytes)
            digest = files.settle(Path(f"/proc/self/fd/{fd}"))
            row = inventory.catalog.ready_with_digest(digest)
            if row is None:
                video_id = self._copy(fd, name, size, digest)
            else:
                video_id = row.video_id
                inventory.renew(video_id)
            if request_id:
                inventory.catalog.remember(request_id, arguments, video_id)
            return video_id

    def _copy(self, fd: int, name: str, size: int, digest: str) -> str:
        """A new video of the open file; nothing is left of it if that fails."""
        video_id = self._inventory.insert(name, size, digest).video_id
        try:
            target = self._inventory.input_path(video_id)
            files.copy_import(fd, target, self._storage.min_free_bytes)
        except BaseException:
            self._inventory.catalog.delete(video_id)
            self._inventory.remove_files(video_id)
            raise
        return video_id
