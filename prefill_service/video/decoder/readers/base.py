"""The readers a decoder child can use, behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.video.index import VideoIndex


class FrameReader(Protocol):
    """Decodes chosen frames of one video.

    Attributes:
        decoded: frames decoded so far, wanted or not.
        seeks: seeks so far.
    """

    decoded: int
    seeks: int

    def __init__(self, path: str, index: VideoIndex, limits: VideoConfig, threads: int) -> None:
        """Open the file at ``path``."""

    def frames(self, targets: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the ascending, distinct ``targets`` as [height, width, 3] uint8 RGB."""


def reader_class(name: str) -> type[FrameReader]:
    """The reader for ``VideoConfig.reader``."""
    if name == "opencv":
        # Imported only if asked for: it costs a decoder child 15 MiB and address space.
        from prefill_service.video.decoder.readers.opencv import OpenCVReader

        return OpenCVReader
    from prefill_service.video.decoder.readers.pyav import PyAVReader

    return PyAVReader
