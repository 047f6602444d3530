"""transformers' own forward and generate on one process, over the same frames."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.video.index import VideoIndex


@cache
def load(model: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).eval()
    return network, AutoProcessor.from_pretrained(model)


def processor_inputs(
    model: Path,
    frames: np.ndarray,
    plan: PrefixPlan,
    index: VideoIndex,
    *,
    text: str,
    size_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The family's processor on the whole video at once.

    Args:
        frames: [frames, height, width, 3].
        size_kwargs: by ``FrameSampler.size_kwargs``; the processor's own size without them.
    """
    _, processor = load(model, torch.float32)
    metadata = VideoMetadata(
        total_num_frames=index.frame_count,
        fps=index.fps,
        duration=index.duration_s,
        frames_indices=plan.frame_indices.tolist(),
    )
    return dict(
        processor(
            text=[text],
            videos=[frames],
            videos_kwargs={
                "do_sample_frames": False,
                "video_metadata": [metadata],
                **(size_kwargs or {}),
            },
            return_tensors="pt",
        )
    )


@torch.no_grad()
def prefix_cache(
    model: Path, inputs: dict[str, Any], plan: PrefixPlan, dtype: torch.dtype = torch.float32
) -> Any:
    """transformers' cache of the prefix, with the plan's positions."""
    network, _ = load(model, dtype)
    known = {k: v for k, v in inputs.items() if k not in ("second_per_grid_ts", "video_metadata")}
    positions = model_positions(plan, torch.from_numpy(plan.position_ids))
    return network(**known, position_ids=positions, use_cache=True).past_key_values


def model_positions(plan: PrefixPlan, positions: torch.Tensor) -> torch.Tensor:
    """Positions [axes, tokens] in the shape that the model of the plan's family takes."""
    no_vision = torch.zeros(positions.shape[1], dtype=torch.bool)
    shaped: torch.Tensor = FAMILIES[plan.family].language_kwargs(positions, no_vision, [])[
        "position_ids"
    ]
    return shaped


def cached_kv(cache: Any) -> torch.Tensor:
    """K and V in a cache: [layers, 2, tokens, kv_heads, head_dim]."""
    return torch.stack(
        [
            torch.stack([x[0].transpose(0, 1) for x in (layer.keys, layer.values)])
            for layer in cache.layers
        ]
    )


def prefix_kv(
    model: Path, inputs: dict[str, Any], plan: PrefixPlan, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """K and V of the prefix with the plan's positions: [layers, 2, tokens, kv_heads, head_dim]."""
    return cached_kv(prefix_cache(model, inputs, plan, dtype))
