"""What a reader of frames is, and which one an option names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.video.index import VideoIndex


class FrameReader(Protocol):
    """Decodes chosen frames of one video.

    Attributes:
        decoded: frames decoded so far, wanted or not.
        seeks: seeks so far.
        unlisted: frames yielded so far whose stored size is not one of the index's ``sizes``.
    """

    decoded: int
    seeks: int
    unlisted: int

    @classmethod
    def open(cls, path: str, index: VideoIndex, limits: VideoConfig, threads: int) -> Self:
        """Open a video.

        Args:
            path: the file.
            index: its index.
            limits: what must be refused.
            threads: decoding threads.

        Raises:
            ServiceError: NOT_A_VIDEO, FORMAT_NOT_ALLOWED, NO_VIDEO_STREAM, VIDEO_LIMIT_EXCEEDED,
                DECODE_FAILED.
        """
        ...

    def frames(self, targets: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the ascending, distinct ``targets`` as [height, width, 3] uint8 RGB.

        Raises:
            ServiceError: DECODE_FAILED, naming the frame.
        """
        ...


def load_reader_class(name: str) -> type[FrameReader]:
    """The reader that ``VideoConfig.reader`` names, imported only now."""
    if name == "opencv":
        # OpenCV costs a decoder process 15 MiB and address space.
        from prefill_service.video.decoder.readers.opencv import OpenCVReader

        return OpenCVReader
    from prefill_service.video.decoder.readers.pyav import PyAVReader

    return PyAVReader
