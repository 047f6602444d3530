"""The plan of a video prefix: everything that can be known before a pixel is decoded.

Made in the front end (processor and tokenizer, no weights), sent to the ranks, and the
source of the prompt that vLLM gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames, how large. ``None`` means the family processor's default.

    Mirrors ``prefill.v1.FrameSampling``.
    """

    fps: float | None = None
    num_frames: int | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    cap_pixels_per_frame: bool | None = None


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A video prefix, planned.

    Attributes:
        prefix_id: content-derived id.
        family: ``model_type`` of the checkpoint, e.g. ``"qwen3_vl"``.
        token_ids: [tokens] int32, the prefix up to and including the end of the video.
        position_ids: [3, tokens] int64, M-RoPE positions (time, height, width) by vLLM's formula.
        position_delta: position of the next token minus its index.
        frame_indices: [frames] int64 into the ``VideoIndex``; padded by repeating the last
            frame when the video has fewer frames than one temporal patch.
        grid_thw: temporal patches, patch rows, patch columns.
        resized_hw: pixels of a resized frame.
        patch_ends: [temporal patches] int64; patch ``i`` owns the tokens
            ``[patch_ends[i-1], patch_ends[i])`` (from 0 for the first, so that it also owns the
            text before the video; the last one owns the text after its pixels).
        placeholder: offset and length of the multimodal span as vLLM wants it.
        second_per_grid_ts: seconds per temporal patch (Qwen2.5-VL), else ``None``.
        system_prompt: the system message the chat template was given.
    """

    prefix_id: str
    family: str
    token_ids: np.ndarray
    position_ids: np.ndarray
    position_delta: int
    frame_indices: np.ndarray
    grid_thw: tuple[int, int, int]
    resized_hw: tuple[int, int]
    patch_ends: np.ndarray
    placeholder: tuple[int, int]
    second_per_grid_ts: float | None
    system_prompt: str
    video_token_id: int
    merge_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, text included."""
        return len(self.token_ids)

    @property
    def num_video_tokens(self) -> int:
        """Vision tokens among them."""
        t, h, w = self.grid_thw
        return t * h * w // self.merge_size**2
