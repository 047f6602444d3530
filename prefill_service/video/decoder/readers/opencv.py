"""Frames of a video through OpenCV, serially: independent of the seek schedule."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
from typing_extensions import override

from prefill_service.config import VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.video.decoder.container import FORMATS, PROTOCOLS, open_container, video_stream
from prefill_service.video.decoder.readers.base import FrameReader
from prefill_service.video.decoder.readers.pyav import decode_failed
from prefill_service.video.geometry import Fit, Geometry
from prefill_service.video.index import VideoIndex

# OpenCV reads its FFmpeg options from the environment; the child's is its own.
os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = (
    f"format_whitelist;{','.join(FORMATS)}|protocol_whitelist;{','.join(PROTOCOLS)}"
)
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
os.environ["OPENCV_FFMPEG_LOGLEVEL"] = "-8"

import cv2

_TIME_TOLERANCE_MS = 2.0


class OpenCVReader(FrameReader):
    """Grabs every frame up to the last wanted one and counts."""

    def __init__(self, capture: cv2.VideoCapture, index: VideoIndex) -> None:
        self._capture = capture
        self._index = index
        self.decoded = 0
        self.seeks = 0
        self.unlisted = 0  # OpenCV scales frames to the first one's size without a word

    @override
    @classmethod
    def open(cls, path: str, index: VideoIndex, limits: VideoConfig, threads: int) -> Self:
        # FFmpeg's reasons do not get through OpenCV: let PyAV refuse what must be refused.
        with open_container(path, limits, threads) as container:
            video_stream(container, limits)
        cv2.setNumThreads(threads)
        capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
        if not capture.isOpened():
            raise ServiceError(Reason.DECODE_FAILED, "OpenCV cannot open the file")
        return cls(capture, index)

    @override
    def frames(self, targets: Sequence[int]) -> Iterator[np.ndarray]:
        index = self._index
        start_ms = 0.0
        for target in targets:
            while self.decoded <= target:
                if not self._capture.grab():
                    raise decode_failed(index, target)
                if self.decoded == 0:
                    start_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC)
                self.decoded += 1
            time_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC)
            if time_ms:  # 0: unknown, as for the last frames of some AVI files
                self._check_time(target, time_ms - start_ms)
            done, image = self._capture.retrieve()
            if not done:
                raise decode_failed(index, target)
            yield _to_rgb(image, index.geometry)

    def _check_time(self, target: int, time_ms: float) -> None:
        """OpenCV passes over damaged frames in silence, which makes the count wrong from there."""
        index = self._index
        if not index.keyframe_count:
            return
        numerator, denominator = index.time_base
        due_ms = float(index.pts[target] - index.pts[0]) * 1000 * numerator / denominator
        if abs(time_ms - due_ms) > _TIME_TOLERANCE_MS:
            raise decode_failed(index, target)


def _to_rgb(image: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[height, width, 3] uint8 RGB of a picture that OpenCV has rotated, though not mirrored."""
    image = np.rot90(image, -geometry.rotation // 90)
    fit = Fit.of(geometry, image.shape[1], image.shape[0])
    if image.shape[:2] != (fit.height, fit.width):
        image = cv2.resize(np.ascontiguousarray(image), (fit.width, fit.height))
    image = fit.paste(image[..., ::-1])
    if geometry.mirrored:
        image = image[::-1]
    return np.ascontiguousarray(np.rot90(image, geometry.rotation // 90))
