"""Qwen3-VL: a timestamp before each temporal patch, deepstack features (arXiv 2511.21631)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from prefill_service.models.families.mrope import mrope_positions
from prefill_service.models.families.qwen_vl import QwenVL


class Qwen3VL(QwenVL):
    """Each temporal patch is a timestamp, a start token, its vision tokens and an end token."""

    model_type = "qwen3_vl"
    text_per_patch = 12

    @override
    def positions(
        self,
        token_ids: np.ndarray,
        fields: Mapping[str, np.ndarray],
        merged_thw: tuple[int, int, int],
        config: Any,
    ) -> tuple[np.ndarray, int]:
        return mrope_positions(token_ids, config.video_token_id, (1, *merged_thw[1:]), 1.0)

    @override
    def locate_vision(
        self, token_ids: np.ndarray, patches: int, config: Any
    ) -> tuple[tuple[int, int], np.ndarray]:
        start = int(np.flatnonzero(token_ids == config.vision_start_token_id)[0])
        vision = np.flatnonzero(token_ids == config.video_token_id)
        # A patch's last vision token is followed by its <|vision_end|>.
        ends = vision.reshape(patches, -1)[:, -1] + 2
        ends[-1] = len(token_ids)
        return (start, len(token_ids) - start), ends

    @override
    def language_kwargs(
        self, position_ids: Tensor, vision_mask: Tensor, deepstack: list[Tensor]
    ) -> dict[str, Any]:
        return {
            **super().language_kwargs(position_ids, vision_mask, deepstack),
            "visual_pos_masks": vision_mask[None],
            "deepstack_visual_embeds": deepstack,
        }


FAMILY = Qwen3VL()
