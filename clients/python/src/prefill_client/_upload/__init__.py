"""The resumable upload, as a flow: nothing here touches the network or blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefill.v1 import video_service_pb2 as video_pb
from prefill_client._requests import new_request_id, upload_request_id
from prefill_client._retry import Backoff, is_broken_stream
from prefill_client._steps import Blocking, FileChunks, Flow, Send, Sleep
from prefill_client._upload._sources import Source, open_source
from prefill_client.errors import NotFoundError, PrefillError, make_error
from prefill_client.types import UploadProgress

CHUNK_BYTES = 256 << 10

UploadCallback = Callable[[UploadProgress], object]
Unary = Callable[[str, Any], Flow[Any]]


def hash_source(source: Source, progress: UploadCallback | None = None) -> Flow[tuple[str, int]]:
    """Return the sha256 (lower-case hexadecimal) and the size in bytes of a source.

    Raises:
        OSError: it cannot be read.
        ArgumentError: what it reads is not bytes.
    """
    digest = hashlib.sha256()
    done = 0
    total = yield Blocking(source.size_hint)
    pieces = source.pieces()

    def advance() -> int:
        data = next(pieces, b"")
        digest.update(data)
        return len(data)

    while count := (yield Blocking(advance)):
        done += count
        if progress is not None:
            progress(UploadProgress("hash", done, max(total, done)))
    return digest.hexdigest(), done


def upload(
    unary: Unary,
    backoff: Backoff,
    what: Any,
    *,
    progress: UploadCallback | None = None,
    display_name: str | None = None,
    sha256: str | None = None,
    allow_truncated: bool = False,
) -> Flow[video_pb.Video]:
    """Upload ``what`` and finish; returns the READY video.

    A READY video with the same digest is returned without sending anything, and an unfinished
    upload of the same bytes, of this process or of an earlier one, is gone on with.

    Args:
        unary: makes a unary call, with retries.
        backoff: allows that many failures in a row without any byte committed.
        what: a path, bytes, or an open file, as ``split_video`` finds them.
        progress: called with each phase's progress.
        display_name: name for people; the file's name by default.
        sha256: digest of the bytes if known already; saves reading them twice.
        allow_truncated: take what can be read of a cut file.

    Raises:
        OSError: the file cannot be read.
        PrefillError: UploadError, InvalidVideoError, CapacityError, UnavailableError...
    """
    source: Source = yield Blocking(lambda: open_source(what))
    try:
        if sha256 is None or not source.seekable:
            found, size = yield from hash_source(source, progress)
            sha256 = sha256 or found
        else:
            size = yield Blocking(source.size_hint)
        name = _text(source.display_name) if display_name is None else display_name
        create = video_pb.CreateUploadRequest(
            display_name=name,
            size_bytes=size,
            sha256=sha256,
            request_id=upload_request_id(sha256, size, name, allow_truncated=allow_truncated),
            allow_truncated=allow_truncated,
        )
        sending = _send_where_needed(
            unary, backoff, source=source, create=create, progress=progress
        )
        return (yield from sending)
    finally:
        source.close()


def _send_where_needed(
    unary: Unary,
    backoff: Backoff,
    *,
    source: Source,
    create: video_pb.CreateUploadRequest,
    progress: UploadCallback | None,
) -> Flow[video_pb.Video]:
    """Find the video of these bytes, or what an earlier upload left of it, and send the rest."""
    size = create.size_bytes
    created = yield from unary("CreateUpload", create)
    # A repeated request id brings the first result, which may be out of date by now.
    video = yield from _usable(unary, created.video.video_id)
    resumed = video is not None and video.committed_bytes > 0
    while True:
        if video is None:
            create.request_id = new_request_id()
            created = yield from unary("CreateUpload", create)
            video = created.video
        if video.state == video_pb.VIDEO_STATE_READY:
            _report(progress, "upload", size, size)
            return video
        chunk = min(CHUNK_BYTES, created.max_chunk_bytes or CHUNK_BYTES)
        try:
            rest = _Rest(video_id=video.video_id, source=source, size=size, chunk_bytes=chunk)
            return (yield from _send_and_finish(unary, backoff, rest, progress))
        except PrefillError as error:
            # What an earlier process sent was not this file: once more, from the start.
            if error.reason != "UPLOAD_DIGEST_MISMATCH" or not resumed:
                raise
            video = None
            resumed = False


def _usable(unary: Unary, video_id: str) -> Flow[video_pb.Video | None]:
    """Return the video as it is now; None if it is gone or was refused."""
    try:
        response = yield from unary("GetVideo", video_pb.GetVideoRequest(video_id=video_id))
    except NotFoundError:
        return None
    video: video_pb.Video = response.video
    return None if video.state == video_pb.VIDEO_STATE_FAILED else video


@dataclass(frozen=True)
class _Rest:
    """A source of ``size`` bytes that goes on to ``video_id`` in messages of ``chunk_bytes``."""

    video_id: str
    source: Source
    size: int
    chunk_bytes: int

    def chunks_from(self, offset: int) -> FileChunks:
        return FileChunks(
            self.video_id,
            self.source,
            offset=offset,
            size=self.size,
            chunk_bytes=self.chunk_bytes,
        )


def _send_and_finish(
    unary: Unary, backoff: Backoff, rest: _Rest, progress: UploadCallback | None
) -> Flow[video_pb.Video]:
    best = -1
    while True:
        status = yield from unary(
            "GetUploadStatus", video_pb.GetUploadStatusRequest(video_id=rest.video_id)
        )
        committed = status.committed_bytes
        _report(progress, "upload", committed, rest.size)
        if committed > best:
            best = committed
            backoff.reset()
        try:
            if committed < rest.size:
                response = yield Send(
                    rest.chunks_from(committed),
                    lambda sent: _report(progress, "upload", sent, rest.size),
                )
                if response.committed_bytes <= committed:
                    raise _stalled(rest.source.name, committed, rest.size)
                continue
            _report(progress, "probe", 0, 0)
            request = video_pb.FinishUploadRequest(video_id=rest.video_id)
            video: video_pb.Video = (yield from unary("FinishUpload", request)).video
            return video
        except PrefillError as error:
            retriable = error.reason in ("UPLOAD_INCOMPLETE", "UPLOAD_STALLED")
            if not retriable and (committed >= rest.size or not is_broken_stream(error)):
                raise
            yield Sleep(backoff.delay(error))


def _text(name: str) -> str:
    """Make a file's name valid UTF-8, as protobuf wants it; on Linux names are bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _stalled(name: str, committed: int, size: int) -> PrefillError:
    return make_error(
        "UPLOAD_STALLED",
        f"the server ended the upload of {name} at {committed} of {size} bytes",
        metadata={"committed_bytes": str(committed), "size_bytes": str(size)},
    )


def _report(progress: UploadCallback | None, phase: str, done: int, total: int) -> None:
    if progress is not None:
        progress(UploadProgress(phase, done, total))
