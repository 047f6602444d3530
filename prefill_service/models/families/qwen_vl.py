"""What the families of Qwen-VL have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from prefill_service.compat import joined
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import (
    Family,
    ModuleNames,
    VideoLayout,
    VisionFeatures,
    VisionInput,
)
from prefill_service.models.layers.vision_attention import VISION_ATTENTION, PatchProduct
from prefill_service.models.prefix_plan import FrameSampling


class QwenVL(Family):
    """A video is a grid of patches, merged 2 x 2 into tokens, with M-RoPE positions.

    Attributes:
        text_per_patch: about how many tokens of text stand beside one temporal patch.
    """

    text_per_patch = 0
    grounding_tokens = frozenset(
        f"<|{mark}_{side}|>" for mark in ("object_ref", "box", "quad") for side in ("start", "end")
    )
    modules = ModuleNames(
        vision_blocks="visual.blocks",
        norms=("input_layernorm", "post_attention_layernorm", "norm1", "norm2"),
        activated=("gate_proj", "linear_fc1"),
    )

    @override
    def frames_per_patch(self, video_processor: Any) -> int:
        return int(video_processor.temporal_patch_size)

    @override
    def size_kwargs(self, video_processor: Any, sampling: FrameSampling) -> dict[str, Any]:
        cap = sampling.cap_pixels_per_frame
        if cap is None:
            cap = bool(video_processor.cap_pixels_per_frame)
        return {"size": _size(video_processor, sampling), "cap_pixels_per_frame": cap}

    @override
    def pixel_limits(self, video_processor: Any, sampling: FrameSampling) -> Sequence[int]:
        token = int(video_processor.patch_size * video_processor.merge_size) ** 2
        longest = _size(video_processor, sampling)["longest_edge"]
        return range(token, max(token, longest) + 1, token)

    @override
    def estimate_tokens(
        self,
        video_processor: Any,
        config: Any,
        *,
        frames: int,
        frame_hw: tuple[int, int],
        sampling: FrameSampling,
    ) -> int:
        patches = video_processor.get_num_of_video_patches(
            frames, *frame_hw, {"size": _size(video_processor, sampling)}
        )
        text = ceil(frames / video_processor.temporal_patch_size) * self.text_per_patch
        return int(patches // video_processor.merge_size**2 + text)

    @override
    def video_token_id(self, config: Any) -> int:
        return int(config.video_token_id)

    @override
    def vllm_fields(self, processed: Mapping[str, Any]) -> dict[str, np.ndarray]:
        grid = [int(n) for n in processed["video_grid_thw"][0]]
        return {"video_grid_thw": np.array(grid, np.int64)}

    @override
    def lay_out(
        self, token_ids: np.ndarray, fields: Mapping[str, np.ndarray], config: Any
    ) -> VideoLayout:
        t, h, w = (int(n) for n in fields["video_grid_thw"])
        vision = config.vision_config
        merge = int(vision.spatial_merge_size)
        position_ids, position_delta = self.positions(
            token_ids, fields, (t, h // merge, w // merge), config
        )
        placeholder, patch_ends = self.locate_vision(token_ids, t, config)
        return VideoLayout(
            position_ids=position_ids,
            position_delta=position_delta,
            placeholder=placeholder,
            patch_ends=patch_ends,
            patch_grid=(t, h, w),
            resized_hw=(h * int(vision.patch_size), w * int(vision.patch_size)),
        )

    @abstractmethod
    def positions(
        self,
        token_ids: np.ndarray,
        fields: Mapping[str, np.ndarray],
        merged_thw: tuple[int, int, int],
        config: Any,
    ) -> tuple[np.ndarray, int]:
        """Position ids [3, tokens] and delta by vLLM's formula.

        Args:
            merged_thw: temporal patches, and rows and columns of the tokens of each.
        """

    @abstractmethod
    def locate_vision(
        self, token_ids: np.ndarray, patches: int, config: Any
    ) -> tuple[tuple[int, int], np.ndarray]:
        """``placeholder`` and ``patch_ends`` of the layout, of so many temporal patches."""

    @override
    def vision_input(self, processed: Mapping[str, Any]) -> VisionInput:
        return {name: processed[name] for name in ("pixel_values_videos", "video_grid_thw")}

    @override
    def patches_per_token(self, config: Any) -> int:
        return int(config.vision_config.spatial_merge_size) ** 2

    @override
    def speed_up(self, model: Any) -> None:
        visual = model.visual
        visual.patch_embed.proj = PatchProduct(visual.patch_embed.proj)
        visual.config._attn_implementation = VISION_ATTENTION

    @override
    def encode(self, model: Any, inputs: VisionInput) -> VisionFeatures:
        output = model.get_video_features(**inputs)
        deepstack = getattr(output, "deepstack_features", None) or []
        return VisionFeatures(
            torch.cat(output.pooler_output), [joined(layer) for layer in deepstack]
        )

    @override
    def language_kwargs(
        self, position_ids: Tensor, vision_mask: Tensor, deepstack: list[Tensor]
    ) -> dict[str, Any]:
        return {"position_ids": position_ids[:, None]}  # [3, 1, tokens]


def _size(video_processor: Any, sampling: FrameSampling) -> dict[str, int]:
    """Bounds on pixels: of the whole video for Qwen3-VL, of a frame for Qwen2.5-VL."""
    default = video_processor.size
    shortest = sampling.min_pixels or default["shortest_edge"]
    longest = sampling.max_pixels or default["longest_edge"]
    if sampling.max_pixels is not None and sampling.min_pixels is None:
        shortest = min(shortest, longest)
    if not 0 < shortest <= longest:
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"min_pixels {shortest} and max_pixels {longest} leave no size",
            min_pixels=shortest,
            max_pixels=longest,
        )
    return {"shortest_edge": shortest, "longest_edge": longest}
