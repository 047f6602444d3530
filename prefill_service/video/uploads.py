"""How files become videos: received in chunks or imported, checked, accepted or refused.

Blocking. A video's lock is held while its bytes change.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from prefill_service.config import StorageConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video import files
from prefill_service.video.database import VideoRow
from prefill_service.video.index import VideoIndex
from prefill_service.video.records import VideoInfo, VideoRecord, VideoState
from prefill_service.video.repository import VideoRepository
from prefill_service.video.validation import (
    check_digest,
    check_name,
    check_path,
    check_size,
)

logger = logging.getLogger(__name__)

# Not the file's fault: its bytes are kept and it can be finished again.
_RETRIABLE = (Reason.INTERNAL, Reason.STORAGE_FULL, Reason.VIDEO_DECODER_KILLED)


class Uploads:
    """The way of a file from its announcement to a READY (or FAILED) video of the repository.

    ``VideoStore`` documents what ``create``, ``append_chunk`` and ``import_file`` raise.
    """

    def __init__(self, repository: VideoRepository, storage: StorageConfig) -> None:
        self._repository = repository
        self._storage = storage

    # ---- receiving --------------------------------------------------------------------

    def create(
        self,
        display_name: str,
        size_bytes: int,
        sha256: str,
        request_id: str,
        *,
        allow_truncated: bool,
    ) -> VideoRecord:
        """Announce a file; returns the upload, or the READY video with the same digest."""
        sha256 = sha256.lower()
        check_name(display_name)
        check_size(size_bytes, self._storage.max_upload_bytes)
        check_digest(sha256)
        repository = self._repository
        arguments = _arguments("upload", display_name, size_bytes, sha256, allow=allow_truncated)

        def make_upload() -> str:
            free = self._storage.min_free_bytes
            files.check_space(repository.videos_dir, size_bytes, free)
            return repository.insert_upload(
                display_name, size_bytes, sha256, allow_truncated=allow_truncated
            )

        with repository.lock("create"):  # two equal requests at once make one video
            video_id = repository.find_request(request_id, arguments)
            if video_id is None:
                video_id = self._find_or_make(sha256, make_upload, allow_truncated)
            else:
                repository.extend_expiry(video_id)
            if request_id:
                repository.database.record_request(request_id, arguments, video_id)
        return repository.get_record(video_id)

    def append_chunk(self, video_id: str, offset: int, data: bytes) -> int:
        """Add a chunk, whole or not at all; returns the bytes committed."""
        self._repository.get_row(video_id)  # only existing videos get a lock
        with self._repository.lock(video_id):
            row = self._repository.get_row(video_id)
            _raise_if_failed(row)
            return files.append_chunk(
                self._repository.input_path(video_id),
                offset,
                data,
                size_bytes=row.size_bytes,
                min_free_bytes=self._storage.min_free_bytes,
            )

    def import_file(
        self, path: str, display_name: str, request_id: str, *, allow_truncated: bool
    ) -> str:
        """Copy a file, unless a READY video has its digest; returns the id to finish."""
        name = display_name or os.path.basename(path)
        check_name(name)
        check_path(path)
        repository = self._repository
        arguments = _arguments("import", name, path, allow=allow_truncated)
        with repository.lock("import"), contextlib.ExitStack() as stack:
            video_id = repository.find_request(request_id, arguments)
            if video_id is not None:
                return video_id
            roots = [Path(root).expanduser() for root in self._storage.import_roots]
            fd = files.open_import(Path(path), roots)
            stack.callback(os.close, fd)
            check_size(os.fstat(fd).st_size, self._storage.max_upload_bytes)
            digest = files.sync_and_digest(Path(f"/proc/self/fd/{fd}"))

            def make_import() -> str:
                return self._copy(fd, name, digest, allow_truncated=allow_truncated)

            video_id = self._find_or_make(digest, make_import, allow_truncated)
            if request_id:
                repository.database.record_request(request_id, arguments, video_id)
            return video_id

    def _find_or_make(self, digest: str, make: Callable[[], str], allow_truncated: bool) -> str:
        """The READY video with this digest, its expiry moved on, or the one that ``make`` makes.

        A video of a cut file is only for those who allow that.
        """
        row = self._repository.database.find_ready(digest)
        if row is not None and not allow_truncated and row.info and row.info.truncated:
            row = None
        if row is None:
            return make()
        self._repository.extend_expiry(row.video_id)
        return row.video_id

    def _copy(self, fd: int, name: str, digest: str, *, allow_truncated: bool) -> str:
        """A new video of the open file; nothing is left of it if that fails."""
        video_id = self._repository.insert_upload(
            name, os.fstat(fd).st_size, digest, allow_truncated=allow_truncated
        )
        try:
            target = self._repository.input_path(video_id)
            files.copy_import(fd, target, self._storage.min_free_bytes)
        except BaseException:
            self._repository.delete_video(video_id)
            raise
        return video_id

    # ---- checking ---------------------------------------------------------------------

    def begin_indexing(self, video_id: str) -> bool:
        """Check size and digest; the video is PROBING then. False if it was READY before.

        Raises:
            ServiceError: UNKNOWN_VIDEO, UPLOAD_INCOMPLETE, UPLOAD_DIGEST_MISMATCH, or the reason
                that the video FAILED for.
        """
        self._repository.get_row(video_id)  # only existing videos get a lock
        with self._repository.lock(video_id):
            row = self._repository.get_row(video_id)
            _raise_if_failed(row)
            if row.state is VideoState.READY:
                return False
            _check_bytes(self._repository.input_path(video_id), row)
            self._repository.database.set_state(video_id, VideoState.PROBING)
        return True

    def accept(self, video_id: str, index: VideoIndex) -> None:
        """Keep the index and make the video READY."""
        files.save_index(index, self._repository.index_path(video_id))
        info = VideoInfo.from_index(index)
        self._repository.database.set_state(video_id, VideoState.READY, info=info)
        self._repository.extend_expiry(video_id)
        logger.info("video %s is ready: %s", video_id, info)

    def refuse(self, video_id: str, error: ServiceError) -> None:
        """Make the video FAILED and remove its bytes, unless the file is not at fault."""
        if error.reason in _RETRIABLE:
            self.interrupt_indexing(video_id)
            return
        logger.warning("video %s is refused: %s", video_id, error)
        self._repository.database.set_state(video_id, VideoState.FAILED, error=error)
        self._repository.input_path(video_id).unlink(missing_ok=True)

    def interrupt_indexing(self, video_id: str) -> None:
        """Make the video UPLOADING again, all its bytes kept: it can be finished later."""
        try:
            self._repository.database.set_state(video_id, VideoState.UPLOADING)
        except ServiceError as error:  # it stays PROBING, and can be finished all the same
            logger.warning("video %s is no longer indexed, but: %s", video_id, error)


def _arguments(*arguments: object, allow: bool) -> str:
    """What a request is compared by if its id comes again."""
    return json.dumps([*arguments, *(["allow_truncated"] if allow else [])])


def _check_bytes(path: Path, row: VideoRow) -> None:
    committed = files.committed_bytes(path)
    if committed != row.size_bytes:
        raise ServiceError(
            Reason.UPLOAD_INCOMPLETE,
            f"{committed} of {row.size_bytes} bytes have been received",
            committed_bytes=committed,
            size_bytes=row.size_bytes,
        )
    digest = files.sync_and_digest(path)
    if digest != row.sha256:
        files.discard_bytes(path)
        raise ServiceError(
            Reason.UPLOAD_DIGEST_MISMATCH,
            f"the bytes received have sha256 {digest}, announced was {row.sha256}; "
            "the upload starts again at 0",
            sha256=digest,
            announced_sha256=row.sha256,
        )


def _raise_if_failed(row: VideoRow) -> None:
    if row.state is VideoState.FAILED:
        reason = Reason(row.error_reason)
        raise ServiceError(reason, row.error_message, video_id=row.video_id)
