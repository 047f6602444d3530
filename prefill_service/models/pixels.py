"""Frames to vision patches, a few temporal patches at a time, as for the whole video at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseVideoProcessor
from transformers.image_utils import SizeDict

from prefill_service.models.families.base import Family, VisionInput


class FramePreprocessor:
    """Runs the family's video processor on part of a video.

    The processors choose the resized size from the whole video's length, so that one decision
    is taken from the plan; resizing, normalising and cutting into patches are the processor's
    own code. Frames are treated one by one there, so parts equal the whole bit for bit.

    Args:
        family: names what the processor returns.
        video_processor: the checkpoint's.
        resized_hw: from the plan.
    """

    def __init__(self, family: Family, video_processor: Any, resized_hw: tuple[int, int]) -> None:
        self._family = family
        self._processor = video_processor
        self._size = SizeDict(height=resized_hw[0], width=resized_hw[1])

    @property
    def frames_per_patch(self) -> int:
        """Frames of one temporal patch."""
        return self._family.frames_per_patch(self._processor)

    def resize(self, frame: np.ndarray) -> Tensor:
        """One frame, small: of a long video only these have to be kept until a chunk is whole.

        Args:
            frame: [height, width, 3] uint8.

        Returns:
            [3, resized height, resized width] uint8.
        """
        image = torch.from_numpy(frame).permute(2, 0, 1)
        resized: Tensor = BaseVideoProcessor.resize(
            self._processor, image=image[None], size=self._size, resample=self._processor.resample
        )[0]
        return resized

    def patches(self, resized: Sequence[Tensor]) -> VisionInput:
        """Patches of some consecutive temporal patches.

        Args:
            resized: what ``resize`` made of their frames; an incomplete last temporal patch is
                filled by the processor as at a video's end.

        Returns:
            What ``PrefillModel.encode`` takes, pixels in float32.
        """
        processed = self._processor(
            [torch.stack(list(resized))],
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
        )
        return self._family.vision_input(processed)

    def __call__(self, frames: Sequence[np.ndarray]) -> VisionInput:
        """Resize frames, each [height, width, 3] uint8, and make patches of them."""
        return self.patches([self.resize(frame) for frame in frames])
