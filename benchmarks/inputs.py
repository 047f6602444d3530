"""Queries, keys and values to measure on: seeded structures of video attention, or a real model's.

The structures are those that the literature finds in video models: *needles* (keys that some
queries want, anywhere), *columns* (keys that everybody wants; sinks among them), *grids* (the same
place in other frames: period = tokens per temporal patch), *drift* (the own scene, which changes
slowly and comes back after cuts) and *diffuse* (nothing in particular); *mixture* gives every query
head its own blend over keys that carry them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

KINDS = ("needles", "columns", "grid", "drift", "diffuse", "mixture")
PATCH_GRID = (8, 12)
"""Rows and columns of the tokens of a synthetic temporal patch."""


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """One layer's attention problem.

    Attributes:
        name: for tables.
        q: [q_heads, tokens, head_dim] float32.
        k, v: [kv_heads, tokens, head_dim] float32.
        scale: factor on the scores.
        place: [tokens] int64, index of the token within its temporal patch, -1 for text.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    place: Tensor


def synthetic(
    kind: str,
    tokens: int,
    *,
    q_heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    seed: int = 0,
) -> AttentionInput:
    """A structured input; equal arguments give equal tensors.

    Raises:
        ValueError: an unknown kind, or head counts that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not known; expected one of {', '.join(KINDS)}")
    if q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are no multiple of {kv_heads} KV heads")
    rng = torch.Generator().manual_seed(seed * len(KINDS) + KINDS.index(kind))
    scale = head_dim**-0.5
    group = q_heads // kv_heads
    place = torch.arange(tokens) % math.prod(PATCH_GRID)
    q = torch.empty(q_heads, tokens, head_dim)
    k, v = torch.empty(2, kv_heads, tokens, head_dim)
    for head in range(kv_heads):
        parts = _structures(kind, tokens, head_dim, scale=scale, rng=rng)
        # An offset that all keys share, large in a few channels: rotary keys with a bias look so.
        offset = torch.zeros(head_dim)
        offset[torch.randperm(head_dim, generator=rng)[:3]] = 5.0
        content = sum((carried for carried, _ in parts.values()), torch.zeros(tokens, head_dim))
        k[head] = _noise(rng, tokens, head_dim) + offset + content
        mix = torch.randn(head_dim, head_dim, generator=rng) * (0.5 / math.sqrt(head_dim))
        v[head] = _noise(rng, tokens, head_dim) + content @ mix
        v[head] += 0.3 * torch.randn(head_dim, generator=rng)
        for index in range(group):
            row = head * group + index
            q[row] = _noise(rng, tokens, head_dim)
            for number, (_, want) in enumerate(parts.values()):
                # In a mixture every head leans on one structure and hears the others faintly.
                gate = 1.0 if len(parts) == 1 or number == index % len(parts) else 0.4
                q[row] += gate * want
    return AttentionInput(name=kind, q=q, k=k, v=v, scale=scale, place=place)


def _structures(
    kind: str, tokens: int, head_dim: int, *, scale: float, rng: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """What keys carry and what queries want, each [tokens, head_dim], per structure.

    The structures live in subspaces that are orthogonal to each other. Gains are the logits at a
    perfect match; they are chosen so that the structure holds half or more of the attention.
    """
    basis = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=rng)).Q
    quarter = head_dim // 4
    spaces = dict(zip(("needles", "columns", "grid", "drift"), basis.split(quarter), strict=True))
    log_tokens = math.log(tokens)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if kind in ("needles", "mixture"):
        found["needles"] = _needles(tokens, spaces["needles"], log_tokens + 2, scale=scale, rng=rng)
    if kind in ("columns", "mixture"):
        found["columns"] = _columns(tokens, spaces["columns"], scale, rng)
    if kind in ("grid", "mixture"):
        found["grid"] = _grid(tokens, spaces["grid"], 6.0, scale=scale, rng=rng)
    if kind in ("drift", "mixture"):
        found["drift"] = _drift(tokens, spaces["drift"], 7.0, scale=scale, rng=rng)
    return found


def _noise(rng: torch.Generator, tokens: int, head_dim: int) -> Tensor:
    """Unstructured part; scores among it have standard deviation 0.64."""
    return 0.8 * torch.randn(tokens, head_dim, generator=rng)


def _unit(rng: torch.Generator, *shape: int) -> Tensor:
    """Random directions, [..., dim] of norm 1."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=rng), dim=-1)


def _amplitude(gain: float, scale: float) -> float:
    """Length that a key's and a query's common direction need for a score of ``gain``."""
    return math.sqrt(gain / scale)


def _needles(
    tokens: int, space: Tensor, gain: float, *, scale: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One key in 512 is a needle; one query in six wants one of those before it."""
    count = max(2, tokens // 512)
    at = torch.randint(0, tokens, (count,), generator=rng).sort().values
    codes = _unit(rng, count, len(space)) @ space * _amplitude(gain, scale)
    keys = torch.zeros(tokens, space.shape[1])
    keys[at] = codes
    position = torch.arange(tokens)
    earlier = torch.searchsorted(at, position)  # needles before the query
    choice = (torch.rand(tokens, generator=rng) * earlier).long().clamp(max=count - 1)
    wants = (torch.rand(tokens, generator=rng) < 1 / 6) & (earlier > 0)
    return keys, codes[choice] * wants[:, None]


def _columns(
    tokens: int, space: Tensor, scale: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The first four keys and one in 256 are wanted by every query, more or less."""
    at = torch.randperm(tokens, generator=rng)[: max(1, tokens // 256)]
    at = torch.cat([torch.arange(min(4, tokens)), at])
    code = space[0] * _amplitude(math.log(256) + 0.7, scale)
    keys = torch.zeros(tokens, space.shape[1])
    keys[at] = code
    eagerness = 0.7 + 0.6 * torch.rand(tokens, 1, generator=rng)
    return keys, code * eagerness


def _grid(
    tokens: int, space: Tensor, gain: float, *, scale: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Keys and queries carry a code of their place in the frame; neighbours have similar ones."""
    codes = torch.randn(1, len(space), *PATCH_GRID, generator=rng)
    kernel = torch.tensor([0.5, 1.0, 0.5])
    kernel = (kernel[:, None] * kernel).expand(len(space), 1, 3, 3)
    codes = torch.nn.functional.conv2d(codes, kernel, padding=1, groups=len(space))
    codes = torch.nn.functional.normalize(codes[0].flatten(1).T, dim=-1)  # [places, dim]
    both = codes[torch.arange(tokens) % len(codes)] @ space * _amplitude(gain, scale)
    return both, both


def _drift(
    tokens: int, space: Tensor, gain: float, *, scale: float, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Per patch a state: its scene's code and a random walk around it; scenes cut and return."""
    patches = -(-tokens // math.prod(PATCH_GRID))
    scenes = _unit(rng, 6, len(space))
    state = torch.empty(patches, len(space))
    walk = torch.zeros(len(space))
    scene = 0
    for patch in range(patches):
        if patch % 8 == 0:
            scene = int(torch.randint(0, len(scenes), (1,), generator=rng))
            walk = torch.zeros(len(space))
        walk = 0.9 * walk + 0.35 * _unit(rng, len(space))
        state[patch] = scenes[scene] + walk
    state = torch.nn.functional.normalize(state, dim=-1)
    both = state.repeat_interleave(math.prod(PATCH_GRID), 0)[:tokens]
    both = both @ space * _amplitude(gain, scale)
    return both, both


def load(path: Path) -> list[AttentionInput]:
    """Tensors saved by ``save`` (or by another program, in its format).

    Raises:
        ValueError: a file without layers.
    """
    saved = torch.load(path, weights_only=True)
    if not saved.get("cap"):
        raise ValueError(f"{path} holds no layers under 'cap'")
    place = _places(saved["ids"][0])
    if "patch_tokens" in saved:  # without timestamps between them, patches form a single run
        place = torch.where(place >= 0, place % saved["patch_tokens"], -1)
    return [
        AttentionInput(
            name=f"layer {layer}", q=q.float(), k=k.float(), v=v.float(), scale=scale, place=place
        )
        for layer, (q, k, v, scale) in sorted(saved["cap"].items())
    ]


def save(path: Path, captured: dict[str, Any]) -> None:
    """Write what ``capture`` returned."""
    torch.save(captured, path)


def _places(ids: Tensor) -> Tensor:
    """Index of each video token within its run (a temporal patch), -1 for text."""
    video = ids == ids.mode().values  # nothing is as frequent in a video's prompt
    position = torch.arange(len(ids))
    last_text = torch.where(video, -1, position).cummax(0).values
    return torch.where(video, position - last_text - 1, -1)


@torch.no_grad()
def capture(checkpoint: Path, *, patches: int, side: int, seed: int) -> dict[str, Any]:
    """Queries, keys and values of every layer of a Qwen2.5-VL or Qwen3-VL on a needle video.

    Args:
        checkpoint: folder with the model and its processor.
        patches: temporal patches of the video (two frames each, two frames per second).
        side: height and width of a frame in pixels.

    Returns:
        ``cap``: layer to (q [q_heads, tokens, head_dim], k, v [kv_heads, ...], scale), after the
        rotary embedding; ``ids``: [1, tokens] the prompt; ``patch_tokens``: per temporal patch.
    """
    import transformers as hf
    from transformers.video_utils import VideoMetadata

    from prefill_service.compat import ensure_torchvision
    from tools.needle import stories, videos

    ensure_torchvision()
    layers: dict[int, tuple[Tensor, Tensor, Tensor, float]] = {}

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *_: object, scaling: float, **__: object
    ) -> tuple[Tensor, None]:
        layers[module.layer_idx] = (q[0].clone(), k[0].clone(), v[0].clone(), scaling)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    hf.AttentionInterface.register("capture", attend)
    processor: Any = hf.AutoProcessor.from_pretrained(checkpoint)
    model: Any = hf.AutoModelForImageTextToText.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation={"text_config": "capture", "vision_config": "sdpa"},
    ).eval()
    rng = np.random.default_rng(seed)
    frames = [
        cv2.resize(frame, (side, side))
        for frame in videos.render(stories.sample_story(patches, rng), rng)
    ]
    metadata = VideoMetadata(
        total_num_frames=len(frames),
        fps=2.0,
        duration=len(frames) / 2.0,
        frames_indices=list(range(len(frames))),
    )
    inputs = processor(
        text=["<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"],
        videos=[frames],
        videos_kwargs={"do_sample_frames": False, "video_metadata": [metadata]},
        return_tensors="pt",
    )
    model.model(**inputs)
    _, height, width = inputs["video_grid_thw"][0].tolist()
    patch_tokens = height * width // model.config.vision_config.spatial_merge_size**2
    return {"cap": layers, "ids": inputs["input_ids"], "patch_tokens": patch_tokens}
