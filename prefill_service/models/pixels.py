"""Frames to vision patches, a few temporal patches at a time, as for the whole video at once."""

from __future__ import annotations

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

    def __call__(self, frames: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Patches of some consecutive temporal patches.

        Args:
            frames: each [height, width, 3] uint8; an incomplete last temporal patch is filled
                by the processor as at a video's end.

        Returns:
            pixel_values [patches, patch_dim] float32 and grid_thw [1, 3].
        """
        video = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)  # [frames, 3, h, w]
        resized = BaseVideoProcessor.resize(
            self._processor, image=video, size=self._size, resample=self._processor.resample
        )
        inputs = self._processor(
            [resized], do_sample_frames=False, do_resize=False, return_tensors="pt"
        )
        return inputs["pixel_values_videos"], inputs["video_grid_thw"]
