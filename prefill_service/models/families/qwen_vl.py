"""What differs between model families. To add one, write a ``Family`` and list it here.

The model code itself is transformers'; see ``prefill_model``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefill_service.models.mrope import mrope_positions


@dataclass(frozen=True, slots=True)
class VideoLayout:
    """How a family lays a video out in a prompt.

    Attributes:
        position_ids: [3, tokens] int64.
        position_delta: next position minus number of tokens.
        placeholder: offset and length of the span vLLM takes for the video.
        patch_ends: [temporal patches] int64, see ``PrefixPlan.patch_ends``.
    """

    position_ids: np.ndarray
    position_delta: int
    placeholder: tuple[int, int]
    patch_ends: np.ndarray


class Family(ABC):
    """One model family. Stateless; ``config`` is the checkpoint's transformers config."""

    @abstractmethod
    def lay_out(
        self,
        token_ids: np.ndarray,
        grid_thw: tuple[int, int, int],
        second_per_grid_ts: float | None,
        config: Any,
    ) -> VideoLayout:
        """Positions, placeholder and patch boundaries of a prefix with one video.

        Args:
            token_ids: [tokens], ending with the video's last token.
            grid_thw: temporal patches, patch rows, patch columns (before merging).
            second_per_grid_ts: seconds per temporal patch, where the family's processor says so.
            config: the checkpoint's configuration.
        """

    def language_kwargs(self, mask: Any, deepstack: list[Any]) -> dict[str, Any]:
        """Arguments of the language model beyond embeddings, positions and cache.

        Args:
            mask: [tokens] bool, which tokens are vision tokens.
            deepstack: per early layer, [vision tokens, hidden] features to add.
        """
        return {}


class Qwen25VL(Family):
    """Qwen2.5-VL: one run of vision tokens; time in absolute seconds (arXiv 2502.13923)."""

    def lay_out(
        self,
        token_ids: np.ndarray,
        grid_thw: tuple[int, int, int],
        second_per_grid_ts: float | None,
        config: Any,
    ) -> VideoLayout:
        """See ``Family.lay_out``."""
        t, h, w = _merged(grid_thw, config)
        # vLLM reads the interval from a float32 tensor; the product must round as there.
        interval = float(np.float32(1.0 if second_per_grid_ts is None else second_per_grid_ts))
        t_factor = interval * config.vision_config.tokens_per_second
        positions, delta = mrope_positions(token_ids, config.video_token_id, (t, h, w), t_factor)
        first = int(np.flatnonzero(token_ids == config.video_token_id)[0])
        ends = first + h * w * np.arange(1, t + 1)
        ends[-1] = len(token_ids)
        return VideoLayout(positions, delta, (first, t * h * w), ends)


class Qwen3VL(Family):
    """Qwen3-VL: a timestamp before each temporal patch, deepstack features (arXiv 2511.21631)."""

    def lay_out(
        self,
        token_ids: np.ndarray,
        grid_thw: tuple[int, int, int],
        second_per_grid_ts: float | None,
        config: Any,
    ) -> VideoLayout:
        """See ``Family.lay_out``."""
        t, h, w = _merged(grid_thw, config)
        positions, delta = mrope_positions(token_ids, config.video_token_id, (1, h, w), 1.0)
        start = int(np.flatnonzero(token_ids == config.vision_start_token_id)[0])
        vision = np.flatnonzero(token_ids == config.video_token_id)
        # A patch's last vision token is followed by its <|vision_end|>.
        ends = vision.reshape(t, h * w)[:, -1] + 2
        ends[-1] = len(token_ids)
        return VideoLayout(positions, delta, (start, len(token_ids) - start), ends)

    def language_kwargs(self, mask: Any, deepstack: list[Any]) -> dict[str, Any]:
        """See ``Family.language_kwargs``."""
        return {"visual_pos_masks": mask[None], "deepstack_visual_embeds": deepstack}


def _merged(grid_thw: tuple[int, int, int], config: Any) -> tuple[int, int, int]:
    t, h, w = grid_thw
    merge = config.vision_config.spatial_merge_size
    return t, h // merge, w // merge


FAMILIES: Mapping[str, Family] = {"qwen2_5_vl": Qwen25VL(), "qwen3_vl": Qwen3VL()}
"""By the checkpoint's ``model_type``."""
