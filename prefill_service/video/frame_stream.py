"""A stream of chosen frames out of a sandboxed decoder process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.pool import DecoderPool
from prefill_service.video.decoder.protocol import index_to_message
from prefill_service.video.decoder.session import DecoderRequest, DecoderSession, blame_file
from prefill_service.video.index import VideoIndex

logger = logging.getLogger(__name__)

_ITERATION_POLL_S = 1.0


class FrameStream:
    """Frames of a video in the order asked for, one decoder process behind it.

    The process works at most one frame ahead of what has been read: then its pipe is full and
    it waits. A process that dies is followed by one that goes on from the frame it died at; the
    file is blamed for a crash only if the second one gets no further.
    """

    def __init__(
        self,
        session: DecoderSession,
        index: VideoIndex,
        wanted: np.ndarray,
        limits: VideoConfig,
        *,
        open_session: Callable[[np.ndarray], DecoderSession],
    ) -> None:
        self._session = session
        self._open_session = open_session
        self._index = index
        self._wanted = wanted
        self._limits = limits
        self._next = 0
        self._unlisted = 0
        self._unlisted_before = 0  # as counted by processes that died
        self._died_at: int | None = None
        self._last: tuple[int, np.ndarray] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        index_path: Path,
        frame_indices: Sequence[int],
        limits: VideoConfig,
        *,
        threads: int = 1,
        square_pixels: bool = False,
        pool: DecoderPool | None = None,
    ) -> FrameStream:
        """Start to decode.

        The calling thread must live as long as the stream (see ``DecoderSession.open``).

        Args:
            path: the video file.
            index_path: its index, as ``VideoIndex.save`` wrote it.
            frame_indices: frames wanted, ascending; a repeat gives the same frame again.
            limits: reader and limits.
            threads: decoding threads of the process.
            square_pixels: whether stored pixels are taken as square.
            pool: where to acquire the process, if not to start one.

        Raises:
            ServiceError: INVALID_REQUEST for indices that do not ascend or are not in the
                video; NOT_A_VIDEO if the file cannot be opened.
        """
        index = VideoIndex.load(index_path)
        if square_pixels:
            index = replace(index, geometry=index.geometry.with_square_pixels())
        wanted = _check_indices(frame_indices, index.frame_count)
        index_header, index_payload = index_to_message(index)

        def open_session(targets: np.ndarray) -> DecoderSession:
            request = DecoderRequest(
                header={"type": "frames", "index": index_header, "threads": threads},
                payload=index_payload + targets.tobytes(),
                cpu_s=limits.stall_timeout_s * (len(targets) + 1) * threads,
                max_answer_bytes=index.width * index.height * 3,
            )
            return DecoderSession.open(path, request, limits, pool)

        session = open_session(np.unique(wanted))
        return cls(session, index, wanted, limits, open_session=open_session)

    @property
    def remaining(self) -> int:
        """Frames that ``poll`` has not returned, repeats counted."""
        return len(self._wanted) - self._next

    @property
    def unlisted(self) -> int:
        """Frames so far, repeats not counted, whose stored size the index does not list."""
        return self._unlisted

    def poll(self, timeout_s: float) -> np.ndarray | None:
        """The next frame, or ``None`` if it is not there within ``timeout_s`` or none is left.

        Returns:
            [height, width, 3] uint8 RGB, turned upright; the caller's own unless repeated.

        Raises:
            ServiceError: DECODE_FAILED (metadata: frame_index, time_s), DECODE_TIMEOUT when no
                frame came for ``limits.stall_timeout_s``, VIDEO_LIMIT_EXCEEDED,
                VIDEO_DECODER_KILLED. The stream is closed then.
        """
        if not self.remaining:
            return None
        wanted = int(self._wanted[self._next])
        if self._last is None or self._last[0] != wanted:
            try:
                frame = self._receive(wanted, timeout_s)
            except ServiceError as error:
                self.close()
                if error.reason is not Reason.VIDEO_DECODER_KILLED:
                    raise
                self._replace_session(wanted, error)
                return None
            if frame is None:
                return None
            self._last = (wanted, frame)
        self._next += 1
        return self._last[1]

    def _replace_session(self, wanted: int, error: ServiceError) -> None:
        """Go on from frame ``wanted`` with another process; raises if one has died there."""
        if self._died_at == wanted:
            raise blame_file(error) from error
        logger.warning("decoding goes on at frame %d: %s", wanted, error)
        self._died_at = wanted
        self._unlisted_before = self._unlisted
        self._session = self._open_session(np.unique(self._wanted[self._next :]))

    def _receive(self, wanted: int, timeout_s: float) -> np.ndarray | None:
        patience_s = self._limits.stall_timeout_s - self._session.silent_s
        message = self._session.receive(min(timeout_s, max(0.0, patience_s)))
        if message is None:
            if self._session.silent_s < self._limits.stall_timeout_s:
                return None
            raise ServiceError(
                Reason.DECODE_TIMEOUT,
                f"frame {wanted} was not decoded within {self._limits.stall_timeout_s:g} s",
                frame_index=wanted,
                limit_s=self._limits.stall_timeout_s,
            )
        header, payload = message
        shape = (self._index.height, self._index.width, 3)
        if header.get("frame") != wanted or len(payload) != shape[0] * shape[1] * 3:
            raise ServiceError(
                Reason.INTERNAL, f"decoder process sent {header}, frame {wanted} was expected"
            )
        self._unlisted = self._unlisted_before + int(header["unlisted"])
        return np.frombuffer(payload, np.uint8).reshape(shape)

    def __iter__(self) -> Iterator[np.ndarray]:
        while self.remaining:
            frame = self.poll(_ITERATION_POLL_S)
            if frame is not None:
                yield frame

    def close(self) -> None:
        """Kill the decoder process. Idempotent."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_indices(frame_indices: Sequence[int], frame_count: int) -> np.ndarray:
    """The indices as [wanted] int64; raises INVALID_REQUEST."""
    wanted = np.asarray(frame_indices, np.int64).reshape(-1)
    if len(wanted) and (wanted[0] < 0 or wanted[-1] >= frame_count or (np.diff(wanted) < 0).any()):
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"frame indices must ascend within 0 to {frame_count - 1}; "
            f"got {len(wanted)} from {wanted[0]} to {wanted[-1]}",
            frame_count=frame_count,
        )
    return wanted
