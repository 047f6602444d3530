"""Frames of the next chunk, decoded and preprocessed while this one is computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from prefill_service.engine.spans import SpanBuffer
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import VisionInput
from prefill_service.models.pixels import FramePreprocessor
from prefill_service.parallel.token_layout import Share
from prefill_service.video.frame_stream import FrameStream

_POLL_S = 0.1


class FramePrefetcher:
    """Turns this rank's frames into patches in a thread, one chunk ahead.

    Host memory is bounded by three chunks of resized frames: the one being computed, the one
    waiting, the one being assembled. Of frames as they were decoded there is one at a time; the
    decoder itself blocks on its pipe.

    Args:
        open_stream: opens the frame stream on this rank's frame indices.
        frames_per_patch: frames that one temporal patch takes.
        on_frames: called with frames decoded so far, frames in all, and the seconds spent.
        spans: notes when each chunk's frames were decoded and prepared.
    """

    def __init__(
        self,
        open_stream: Callable[[Sequence[int]], FrameStream],
        preprocess: FramePreprocessor,
        frame_indices: np.ndarray,
        frames_per_patch: int,
        *,
        shares: Sequence[Share],
        on_frames: Callable[[int, int, float], None],
        spans: SpanBuffer | None = None,
    ) -> None:
        self._open_stream = open_stream
        self._preprocess = preprocess
        self._on_frames = on_frames
        self._spans = spans or SpanBuffer()
        # The video's last patch may be short of frames; slicing leaves that to the processor.
        self._chunks = [
            share.select_patches(frame_indices, frames_per_patch)
            for share in shares
            if share.num_patches
        ]
        self._queue: queue.Queue[VisionInput | BaseException] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="frame-prefetcher", daemon=True)

    def start(self) -> None:
        """Start to decode."""
        self._thread.start()

    def next(self, cancelled: threading.Event) -> VisionInput | None:
        """The next share's pixels; ``None`` when ``cancelled`` is set first.

        Raises:
            ServiceError: what decoding failed with.
        """
        while not cancelled.is_set():
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(item, ServiceError):
                raise item
            if isinstance(item, BaseException):
                raise ServiceError(
                    Reason.DECODE_FAILED, f"preparing frames failed: {item!r}"
                ) from item
            return item
        return None

    def close(self) -> None:
        """Stop the thread and the decoder, if they were started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._produce()
        except Exception as error:
            self._put(error)

    def _produce(self) -> None:
        if not self._chunks:
            return
        done = 0
        seconds = 0.0
        indices = np.concatenate(self._chunks).tolist()
        with self._open_stream(indices) as stream:
            for number, chunk in enumerate(self._chunks):
                frames: list[Tensor] = []
                start = time.perf_counter()
                while len(frames) < len(chunk):
                    if self._stop.is_set():
                        return
                    frame = stream.poll(_POLL_S)
                    if frame is not None:
                        frames.append(self._preprocess.resize(frame))
                        now = time.perf_counter()
                        self._on_frames(done + len(frames), len(indices), seconds + now - start)
                pixels = self._preprocess.patches(frames)
                done += len(frames)
                self._spans.note("decode", f"chunk {number}", start, frames=len(frames))
                seconds += time.perf_counter() - start
                self._put(pixels)

    def _put(self, item: VisionInput | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue
