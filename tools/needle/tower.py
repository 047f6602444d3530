"""The vision tower on many temporal patches at once, and rendered patches to feed it.

Temporal patches are independent of each other in Qwen3-VL's tower, so features can be computed
once and videos be assembled from them, exactly. What is lost is the background's continuity.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.needle.checkpoint import GRID, MERGE, PATCH, TOKENS_PER_PATCH
from tools.needle.stories import COLORS, SHAPES, Needle, Story
from tools.needle.videos import SAMPLED_FPS, SIDE, read_frames, render, write_mp4

CLIP_PATCHES = 64
NEEDLE_SHARE = 0.6
NOTHING = len(SHAPES) * len(COLORS)
"""Label of a patch without a needle; others are shape * colours + colour."""

_TOWER_BATCH = 256


def clip(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames [CLIP_PATCHES, 2, SIDE, SIDE, 3] after an mp4 round trip, labels [CLIP_PATCHES]."""
    rng = np.random.default_rng(seed)
    some = rng.integers(0, NOTHING, CLIP_PATCHES)
    labels = np.where(rng.random(CLIP_PATCHES) < NEEDLE_SHARE, some, NOTHING)
    colors = list(COLORS)
    needles = tuple(
        Needle(SHAPES[label // len(COLORS)], colors[label % len(COLORS)], (index,))
        for index, label in enumerate(labels.tolist())
        if label != NOTHING
    )
    story = Story(CLIP_PATCHES, needles, 0)
    with tempfile.TemporaryDirectory() as folder:
        frames = read_frames(write_mp4(Path(folder) / "clip.mp4", story, seed))
    if len(frames) != SAMPLED_FPS * CLIP_PATCHES:  # OpenCV builds differ; pixels hardly do
        frames = np.stack(list(render(story, np.random.default_rng(seed))))
    return frames.reshape(CLIP_PATCHES, 2, SIDE, SIDE, 3), labels


def clips(count: int, seed: int, workers: int) -> tuple[Tensor, Tensor]:
    """Patches of ``count`` clips: [patches, 2, SIDE, SIDE, 3] uint8, labels [patches] int64."""
    seeds = range(seed, seed + count)
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            made = pool.map(clip, seeds, chunksize=8)
    else:
        made = [clip(one) for one in seeds]
    frames = np.concatenate([frames for frames, _ in made])
    labels = np.concatenate([labels for _, labels in made])
    return torch.from_numpy(frames), torch.from_numpy(labels).long()


def features(model: Any, frames: Tensor) -> list[Tensor]:
    """Merged features, then each deepstack layer's: [patches, TOKENS_PER_PATCH, hidden].

    Args:
        model: a ``Qwen3VLForConditionalGeneration``.
        frames: [patches, 2, SIDE, SIDE, 3] uint8.
    """
    count = len(frames)
    grid = torch.tensor([[count, GRID, GRID]], device=frames.device)
    output = model.model.visual(_pixels(frames), grid_thw=grid, return_dict=True)
    found = [output.pooler_output, *output.deepstack_features]
    return [f.view(count, TOKENS_PER_PATCH, -1) for f in found]


@torch.no_grad()
def feature_bank(model: Any, frames: Tensor, device: torch.device) -> Tensor:
    """[patches, TOKENS_PER_PATCH, 1 + deepstack layers, hidden] in half precision."""
    parts = [
        torch.stack(features(model, part.to(device)), 2).half()
        for part in frames.split(_TOWER_BATCH)
    ]
    return torch.cat(parts)


def _pixels(frames: Tensor) -> Tensor:
    """As Qwen's video processor orders and scales them: [patches * GRID^2, 2 * 3 * PATCH^2]."""
    count = len(frames)
    blocks = GRID // MERGE
    x = frames.permute(0, 1, 4, 2, 3).float() / 127.5 - 1  # [count, 2, 3, SIDE, SIDE]
    x = x.view(count, 2, 3, blocks, MERGE, PATCH, blocks, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(count * GRID * GRID, -1)


@contextmanager
def batched(model: Any) -> Iterator[None]:
    """Within it the tower attends to all patches in one call instead of one by one.

    Same result; the library's loop over temporal patches would dominate training.
    """
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen

    def attention(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        tokens = hidden_states.shape[0]
        parts = self.qkv(hidden_states).reshape(tokens, 3, self.num_heads, -1)
        q, k, v = parts.permute(1, 0, 2, 3).unbind(0)
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, *kwargs["position_embeddings"])
        q, k, v = (
            x.reshape(-1, GRID * GRID, self.num_heads, x.shape[-1]).transpose(1, 2)
            for x in (q, k, v)
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scaling)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(tokens, -1))
        return projected

    visual = model.model.visual
    embed = visual.patch_embed
    modules: list[tuple[Any, Callable[..., Tensor]]] = [
        (block.attn, types.MethodType(attention, block.attn)) for block in visual.blocks
    ]
    # A convolution whose kernel is its input is a matrix product, and a faster one.
    modules.append(
        (
            embed,
            lambda x: torch.nn.functional.linear(x, embed.proj.weight.flatten(1), embed.proj.bias),
        )
    )
    for module, forward in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward
