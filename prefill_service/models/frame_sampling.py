"""Which frames of a video are looked at, and how many would fit: by the processor's own rule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefill_service.compat import ensure_torchvision
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import Family
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.timeline import Timeline
from prefill_service.video.geometry import Geometry
from prefill_service.video.index import VideoIndex, VideoWarning, WarningReason

ensure_torchvision()

from transformers.video_utils import VideoMetadata  # noqa: E402


def _metadata(timeline: Timeline, numbers: np.ndarray | None = None) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=timeline.frame_count,
        fps=timeline.fps,
        duration=timeline.index.duration_s,
        frames_indices=None if numbers is None else numbers.tolist(),
    )


@dataclass(frozen=True, slots=True)
class SampledFrames:
    """The frames of a file that are looked at.

    Attributes:
        timeline: what they were sampled from.
        numbers: [frames] int64 of the timeline, ascending.
        rate_warnings: that the asked rate is not that of the frames, if so.
    """

    timeline: Timeline
    numbers: np.ndarray
    rate_warnings: tuple[VideoWarning, ...] = ()

    @property
    def indices(self) -> np.ndarray:
        """[frames] int64 into the ``VideoIndex``."""
        return self.timeline.frames(self.numbers)

    @property
    def seconds(self) -> np.ndarray:
        """[frames] float64, when each is shown."""
        return self.timeline.seconds(self.numbers)

    @property
    def warnings(self) -> tuple[VideoWarning, ...]:
        """The file's warnings, and those of stamps that are wrong or a rate that is not met."""
        return (
            *self.timeline.index.warnings,
            *self.timeline.warn(self.numbers),
            *self.rate_warnings,
        )

    @property
    def metadata(self) -> VideoMetadata:
        """What processors stamp them by."""
        return _metadata(self.timeline, self.numbers)


class FrameSampler:
    """Applies a ``FrameSampling`` to videos.

    Args:
        family: of the checkpoint.
        video_processor: the checkpoint's.
        config: the checkpoint's configuration.

    Attributes:
        frames_per_patch: frames that one temporal patch takes.
    """

    def __init__(self, family: Family, video_processor: Any, config: Any) -> None:
        self._family = family
        self._processor = video_processor
        self._config = config
        self.frames_per_patch = family.frames_per_patch(video_processor)

    def sample(self, index: VideoIndex, sampling: FrameSampling) -> SampledFrames:
        """The frames that are looked at.

        Raises:
            ServiceError: INVALID_REQUEST, when the sampling cannot be applied to this video.
        """
        _check(sampling, self.frames_per_patch)
        timeline = Timeline.choose(_as_sampled(index, sampling), sampling.by)
        self._check_number(timeline, sampling)
        warnings: tuple[VideoWarning, ...] = ()
        if timeline.frame_count < max(2, self.frames_per_patch):  # nothing to choose from
            numbers = np.arange(timeline.frame_count)
        else:
            numbers = self._by_processor(timeline, sampling)
            warnings = self._clipped_rate(timeline, len(numbers), sampling)
        # Fewer frames than one temporal patch: the processors refuse, so repeat the last
        # frame, which is what they do to fill a longer video's last patch.
        missing = max(0, self.frames_per_patch - len(numbers))
        numbers = np.concatenate([numbers, np.repeat(numbers[-1:], missing)])
        return SampledFrames(timeline, numbers, warnings)

    def size_kwargs(self, sampling: FrameSampling) -> dict[str, Any]:
        """The processor's arguments for the size of frames.

        Raises:
            ServiceError: INVALID_REQUEST, when no size is left.
        """
        return self._family.size_kwargs(self._processor, sampling)

    def estimate_tokens(self, index: VideoIndex, sampling: FrameSampling) -> int:
        """About how many tokens the sampled frames make.

        Raises:
            ServiceError: INVALID_REQUEST, as ``sample`` and ``size_kwargs``, and for frames of a
                shape that the processor refuses.
        """
        sampled = self.sample(index, sampling)
        hw = sampled.timeline.index.geometry.display_hw
        return self._estimate(hw, len(sampled.numbers), sampling)

    def check_frames(self, geometry: Geometry) -> None:
        """Check that the processor takes such frames, whatever is sampled.

        Raises:
            ServiceError: INVALID_REQUEST, with their size and the processor's limit.
        """
        self._estimate(geometry.display_hw, self.frames_per_patch, FrameSampling())

    def suggest_fit(self, index: VideoIndex, sampling: FrameSampling, limit_tokens: int) -> str:
        """A sentence saying which number of frames or which size would fit ``limit_tokens``.

        It is empty if the sampling cannot be applied at all.
        """
        try:
            sampled = self.sample(index, sampling)
        except ServiceError:
            return ""
        frames = len(sampled.numbers)
        hw = sampled.timeline.index.geometry.display_hw
        limits = self._family.pixel_limits(self._processor, sampling)

        def fits(number: int, how: FrameSampling) -> bool:
            try:
                return self._estimate(hw, number, how) <= limit_tokens
            except ServiceError:
                return False

        def frames_fit(number: int) -> bool:
            return fits(number, sampling)

        def pixels_fit(number: int) -> bool:
            return fits(frames, replace(sampling, min_pixels=1, max_pixels=limits[number - 1]))

        options = []
        fitting = _largest(frames_fit, self.frames_per_patch, frames)
        if fitting:
            fps = fitting * sampled.timeline.fps / sampled.timeline.frame_count
            options.append(f"num_frames={fitting} (fps={math.floor(fps * 1000) / 1000:g})")
        fitting = _largest(pixels_fit, 1, len(limits))
        if fitting:
            options.append(f"max_pixels={limits[fitting - 1]}")
        return f"{' or '.join(options)} would fit" if options else "no sampling of it would fit"

    def _check_number(self, timeline: Timeline, sampling: FrameSampling) -> None:
        """Refuse more frames than the video has; a processor would make room for any number."""
        most = max(timeline.frame_count, self.frames_per_patch)
        number = sampling.num_frames
        if number is not None and number > most:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"num_frames is {number}, but the video has {timeline.frame_count}; max_frames is "
                "a limit that a video may have fewer frames than",
                name="num_frames",
                value=number,
                maximum=most,
            )

    def _clipped_rate(
        self, timeline: Timeline, frames: int, sampling: FrameSampling
    ) -> tuple[VideoWarning, ...]:
        """Says that so many frames are not what ``fps`` asks for, if a limit nobody asked for acts.

        Numbers are rounded to whole temporal patches, which is no limit.
        """
        if sampling.fps is None:
            return ()
        patch = self.frames_per_patch
        seconds = timeline.frame_count / timeline.fps
        wanted = sampling.fps * seconds
        asked = sampling.max_frames is not None and frames > sampling.max_frames - patch
        if frames <= wanted < frames + patch or (asked and frames < wanted):
            return ()
        if frames > wanted:
            limit = "the model's processor takes no fewer"
        elif frames > timeline.frame_count - patch:
            limit = "the video has no more"
        else:
            limit = "the model's processor takes no more by a rate; max_frames raises that"
        message = (
            f"fps = {sampling.fps:g} would be {wanted:,.0f} frames in {seconds:.1f} s; {frames} "
            f"are looked at, {frames / seconds:.3g} a second: {limit}"
        )
        return (VideoWarning(WarningReason.FPS_CLIPPED, message),)

    def _by_processor(self, timeline: Timeline, sampling: FrameSampling) -> np.ndarray:
        metadata = _metadata(timeline)
        processor = self._processor
        limit = sampling.max_frames
        if limit is not None and hasattr(processor, "max_frames"):
            processor = copy.copy(processor)
            processor.max_frames = limit
        fps = sampling.fps
        num_frames = sampling.num_frames
        if fps is num_frames is processor.fps is processor.num_frames is None:
            fps = self._family.default_fps
        try:
            indices = np.asarray(processor.sample_frames(metadata, num_frames=num_frames, fps=fps))
            if limit is not None and len(indices) > limit:  # a processor without a limit of its own
                whole = limit - limit % self.frames_per_patch
                indices = np.asarray(processor.sample_frames(metadata, num_frames=whole))
            return indices
        except (ValueError, ZeroDivisionError) as error:
            raise ServiceError(
                Reason.INVALID_REQUEST, f"the video cannot be sampled as asked: {error}"
            ) from error

    def _estimate(self, frame_hw: tuple[int, int], frames: int, sampling: FrameSampling) -> int:
        try:
            return self._family.estimate_tokens(
                self._processor,
                self._config,
                frames=frames,
                frame_hw=frame_hw,
                sampling=sampling,
            )
        except ValueError as error:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"the model's video processor refuses {frames} frames of {frame_hw[1]} x "
                f"{frame_hw[0]} pixels: {error}",
                width=frame_hw[1],
                height=frame_hw[0],
            ) from error


def _as_sampled(index: VideoIndex, sampling: FrameSampling) -> VideoIndex:
    """The index, with pixels taken as square if that is asked for."""
    if not sampling.square_pixels:
        return index
    return replace(index, geometry=index.geometry.with_square_pixels())


def _check(sampling: FrameSampling, frames_per_patch: int) -> None:
    fps = sampling.fps
    num_frames = sampling.num_frames
    if fps is not None and num_frames is not None:
        raise ServiceError(Reason.INVALID_REQUEST, "fps and num_frames exclude each other")
    if fps is not None and not (math.isfinite(fps) and fps > 0):
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"fps is {fps}, it must be more than 0 and finite",
            name="fps",
            value=fps,
        )
    if num_frames is not None and sampling.max_frames is not None:
        raise ServiceError(Reason.INVALID_REQUEST, "num_frames and max_frames exclude each other")
    for name in ("num_frames", "max_frames"):
        number = getattr(sampling, name)
        if number is not None and number < frames_per_patch:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"{name} is {number}; one temporal patch takes {frames_per_patch}",
                name=name,
                value=number,
                minimum=frames_per_patch,
            )
    for name in ("max_pixels", "min_pixels"):
        number = getattr(sampling, name)
        if number is not None and number < 1:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"{name} is {number}, it must be at least 1",
                name=name,
                value=number,
                minimum=1,
            )


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Largest n in [low, high] with ``fits(n)``, which is monotone; 0 if there is none."""
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
