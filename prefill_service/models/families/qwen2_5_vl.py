"""Qwen2.5-VL: one run of vision tokens; time in absolute seconds (arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from prefill_service.models.families.mrope import mrope_positions
from prefill_service.models.families.qwen_vl import QwenVL


class Qwen25VL(QwenVL):
    """All vision tokens follow each other, between one start and one end token."""

    model_type = "qwen2_5_vl"

    @override
    def vllm_fields(self, processed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        fields = super().vllm_fields(processed)
        interval = processed.get("second_per_grid_ts")
        if interval is not None:
            fields["second_per_grid_ts"] = np.array(float(interval[0]), np.float32)
        return fields

    @override
    def positions(
        self,
        token_ids: np.ndarray,
        fields: Mapping[str, np.ndarray],
        merged_thw: tuple[int, int, int],
        config: Any,
    ) -> tuple[np.ndarray, int]:
        # vLLM reads the interval from a float32 tensor; the product must round as there.
        interval = float(np.float32(fields.get("second_per_grid_ts", 1.0)))
        t_factor = interval * config.vision_config.tokens_per_second
        return mrope_positions(token_ids, config.video_token_id, merged_thw, t_factor)

    @override
    def locate_vision(
        self, token_ids: np.ndarray, patches: int, config: Any
    ) -> tuple[tuple[int, int], np.ndarray]:
        vision = np.flatnonzero(token_ids == config.video_token_id)
        first = int(vision[0])
        ends = first + len(vision) // patches * np.arange(1, patches + 1)
        ends[-1] = len(token_ids)
        return (first, len(vision)), ends


FAMILY = Qwen25VL()
