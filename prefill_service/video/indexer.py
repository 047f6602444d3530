"""Indexing an untrusted file: whether it is a video that we can decode, and its frames."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.protocol import BYTES_PER_FRAME, index_from_message
from prefill_service.video.decoder.session import DecoderRequest, DecoderSession, blame_file
from prefill_service.video.index import VideoIndex

logger = logging.getLogger(__name__)


async def index_video(
    path: Path,
    limits: VideoConfig,
    pool: DecoderPool | None = None,
    *,
    allow_truncated: bool = False,
) -> VideoIndex:
    """Index a video in a sandboxed decoder process, one of ``pool`` if given.

    Cancelling the call kills the process. Of a cut file, what can be read is taken if
    ``allow_truncated``. A process that dies is followed by another one, once.

    Raises:
        ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, NO_VIDEO_STREAM, NO_FRAMES,
            TRUNCATED_VIDEO, DECODE_FAILED, DECODE_TIMEOUT, VIDEO_LIMIT_EXCEEDED (metadata:
            limit, value, maximum), VIDEO_DECODER_KILLED.
    """
    request = DecoderRequest(
        header={"type": "index", "allow_truncated": allow_truncated},
        payload=b"",
        cpu_s=limits.probe_timeout_s + 1,
        max_answer_bytes=BYTES_PER_FRAME * limits.max_frames,
    )
    try:
        return await _index_once(path, request, limits, pool)
    except ServiceError as error:
        if error.reason is not Reason.VIDEO_DECODER_KILLED:
            raise
        logger.warning("%s is indexed once more: %s", path, error)
    try:
        return await _index_once(path, request, limits, pool)
    except ServiceError as error:
        if error.reason is not Reason.VIDEO_DECODER_KILLED:
            raise
        raise blame_file(error) from error


async def _index_once(
    path: Path, request: DecoderRequest, limits: VideoConfig, pool: DecoderPool | None
) -> VideoIndex:
    session = DecoderSession.open(path, request, limits, pool)
    answer = asyncio.create_task(asyncio.to_thread(_receive_index, session, limits))
    try:
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        session.kill()  # ends the thread's wait; the thread closes the session
        await asyncio.wait([answer])
        answer.exception()
        raise


def _receive_index(session: DecoderSession, limits: VideoConfig) -> VideoIndex:
    started = time.monotonic()
    with session:
        message = session.receive(limits.probe_timeout_s)
        if message is None:
            raise ServiceError(
                Reason.DECODE_TIMEOUT,
                f"indexing the video took longer than {limits.probe_timeout_s:g} s",
                limit_s=limits.probe_timeout_s,
                elapsed_s=f"{time.monotonic() - started:.1f}",
            )
    header, payload = message
    try:
        index, rest = index_from_message(header, bytes(payload))
    except (KeyError, TypeError, ValueError) as error:
        raise ServiceError(
            Reason.INTERNAL, f"decoder process sent an unsound index: {error}"
        ) from error
    if rest or index.width * index.height > limits.max_frame_pixels:
        raise ServiceError(Reason.INTERNAL, "decoder process sent an unsound index")
    return index
