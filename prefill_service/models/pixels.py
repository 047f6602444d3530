"""Frames to vision patches, a few temporal patches at a time, as for the whole video at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BaseVideoProcessor
from transformers.image_utils import SizeDict


class FramePreprocessor:
    """Runs the family's video processor on part of a video.

    The processors choose the resized size from the whole video's length, so that one decision
    is taken from the plan; resizing, normalising and cutting into patches are the processor's
    own code. Frames are treated one by one there, so parts equal the whole bit for bit.

    Args:
        video_processor: the checkpoint's.
        resized_hw: from the plan.
    """

    def __init__(self, video_processor: Any, resized_hw: tuple[int, int]) -> None:
        self._processor = video_processor
        self._size = SizeDict(height=resized_hw[0], width=resized_hw[1])

    @property
    def temporal_patch_size(self) -> int:
        """Frames of one temporal patch."""
        return int(self._processor.temporal_patch_size)

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

    def patches(self, resized: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patches of some consecutive temporal patches.

        Args:
            resized: what ``resize`` made of their frames; an incomplete last temporal patch is
                filled by the processor as at a video's end.

        Returns:
            pixel_values [patches, patch_dim] float32 and grid_thw [1, 3].
        """
        inputs = self._processor(
            [torch.stack(list(resized))],
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
        )
        return inputs["pixel_values_videos"], inputs["video_grid_thw"]

    def __call__(self, frames: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Both: patches of frames, each [height, width, 3] uint8."""
        return self.patches([self.resize(frame) for frame in frames])
