"""The plan of a video prefix: everything that can be known before a pixel is decoded.

Made in the front end (processor and tokenizer, no weights), sent to the ranks, and the
source of the prompt that vLLM gets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from prefill_service.video.index import VideoWarning


class SampleBy(StrEnum):
    """What is evenly spaced among sampled frames (``prefill.v1.SampleBy``)."""

    FRAME = "FRAME"
    TIME = "TIME"


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames, how large. ``None`` means the family processor's default.

    ``by`` is TIME by default for files whose rate varies (``timeline.VARIABLE_S``), else FRAME.
    Mirrors ``prefill.v1.FrameSampling``.
    """

    fps: float | None = None
    num_frames: int | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    cap_pixels_per_frame: bool | None = None
    max_frames: int | None = None
    by: SampleBy | None = None
    square_pixels: bool | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrameSampling:
        """Rebuild a sampling from ``dataclasses.asdict``, in which ``by`` is a string."""
        by = data.get("by")
        return cls(**{**data, "by": SampleBy(by) if by else None})


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A video prefix, planned.

    Attributes:
        prefix_id: content-derived id.
        family: ``model_type`` of the checkpoint, e.g. ``"qwen3_vl"``.
        token_ids: [tokens] int32, the prefix up to the question, with whatever closes the video.
        position_ids: [axes, tokens] int64 by vLLM's formula; the axes of M-RoPE are time, height
            and width, other families have one.
        position_delta: position of the next token minus its index.
        frame_indices: [frames] int64 into the ``VideoIndex``; padded by repeating the last
            frame when the video has fewer frames than one temporal patch. Sampled by time, a
            frame that is shown long comes more than once.
        frame_seconds: [frames] float64, the time that each stands for, after the first frame of
            the video.
        patch_grid: temporal patches, and patch rows and columns of each.
        resized_hw: pixels of a resized frame.
        patch_ends: [temporal patches] int64; patch ``i`` owns the tokens
            ``[patch_ends[i-1], patch_ends[i])`` (from 0 for the first, so that it also owns the
            text before the video; the last one owns the text after its pixels).
        placeholder: offset of the first vision token, and tokens from there to the last one; see
            ``VideoLayout``.
        vllm_fields: what vLLM gets of the video instead of its pixels, by the names of its model.
        system_prompt: the system message the chat template was given.
        video_token_id: id of the tokens that vision features take the place of.
        num_video_tokens: how many of them there are.
        warnings: the video's, and that of its sampling.
        square_pixels: whether frames are decoded without regard to their sample aspect ratio.
    """

    prefix_id: str
    family: str
    token_ids: np.ndarray
    position_ids: np.ndarray
    position_delta: int
    frame_indices: np.ndarray
    frame_seconds: np.ndarray
    patch_grid: tuple[int, int, int]
    resized_hw: tuple[int, int]
    patch_ends: np.ndarray
    placeholder: tuple[int, int]
    vllm_fields: Mapping[str, np.ndarray]
    system_prompt: str
    video_token_id: int
    num_video_tokens: int
    warnings: tuple[VideoWarning, ...] = ()
    square_pixels: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix, text included."""
        return len(self.token_ids)


def extend_plan(plan: PrefixPlan, token_ids: Sequence[int]) -> PrefixPlan:
    """The plan of a prefix that goes on, after the video, with the first tokens of a question.

    All but tokens, positions and id are the video's. Text counts positions on, on every axis.
    """
    added = np.asarray(token_ids, np.int32)
    index = plan.num_tokens + np.arange(len(added), dtype=np.int64)
    positions = np.broadcast_to(index + plan.position_delta, (len(plan.position_ids), len(added)))
    key = bytes.fromhex(plan.prefix_id) + added.tobytes()
    return replace(
        plan,
        prefix_id=hashlib.sha256(key).hexdigest(),
        token_ids=np.concatenate([plan.token_ids, added]),
        position_ids=np.concatenate([plan.position_ids, positions], 1),
    )
