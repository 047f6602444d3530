"""Queries, keys and values with the structure of video attention, made on the device.

Random weights make attention diffuse: no key stands out, and nothing can be left out. So the layers
run as they are, and only what attends is replaced by what is generated here, after the projections
and the rotary embedding. It is the structure that the literature finds in video models, and that
``benchmarks.inputs`` has on the CPU, for lengths that would take minutes there:

* *sinks*: the first four tokens, which every query wants (StreamingLLM, arXiv 2309.17453);
* *drift*: the own scene, which changes slowly, is cut after some seconds and may come back;
* *grid*: the same place, and what is near it, in other frames (MMInference, arXiv 2504.16083);
* *needles*: one key in 512, wanted by one query in six of the heads that retrieve;
* *content*: a place looks much as it did in the frame before (a first-order autoregression per
  place, broken by cuts) and as its neighbours do, in few dimensions, as keys are (Loki, arXiv
  2406.02542);
* *noise*: independent in every dimension, with a standard deviation of ``spread`` where a code's
  length is 1.

KV heads are of one kind each, with all query heads that share them (DuoAttention, arXiv 2410.10819,
finds streaming and retrieving ones): every other one streams (sinks and drift), the others see
grids, retrieve, follow content, or nothing much. With ``mixed`` every group has all kinds, so that
one query head or another of each group wants almost anything: little can be left out then. Gains
are logits at a perfect match. Those of sinks and needles grow with the logarithm of the position
where all of the prompt competes with them: their share of attention does not fall with length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("stream", "grid", "stream", "retrieve", "stream", "content", "stream", "diffuse")
SINKS = 4
NEEDLE_EVERY = 512
WANTED_BY = 6
SPREAD = 0.05
SCENE_PATCHES = 12
SMOOTHINGS = 2

AMPLITUDE = {"sink": 4.0, "drift": 2.6, "grid": 2.4, "needle": 3.5, "content": 2.2}
"""Of keys: about the root of the gain that most wants it, as queries' are then, too."""

GAINS: dict[str, dict[str, float]] = {
    # Sinks and needles of what takes in the whole prompt gain with the logarithm of the position.
    "stream": {"anchor": 13.5, "drift": 9.0, "grid": 1.0, "content": 1.0},
    "grid": {"sink": 2.0, "drift": 3.0, "grid": 6.0, "content": 1.0},
    "retrieve": {"sink": 2.0, "needle": 3.0, "drift": 5.0, "grid": 1.0, "content": 1.0},
    "content": {"sink": 2.0, "drift": 3.0, "grid": 3.0, "content": 5.0},
    "diffuse": {"sink": 0.0, "drift": 2.0, "grid": 1.0, "content": 1.0},
}


@dataclass(frozen=True, slots=True)
class Frames:
    """The prompt as the generator sees it.

    Attributes:
        tokens: of the prompt.
        patch_tokens: tokens of a temporal patch, its text included; in rows of ``columns``.
        patches: temporal patches, the last one perhaps cut short.
    """

    tokens: int
    patch_tokens: int
    columns: int = 18

    @property
    def patches(self) -> int:
        return -(-self.tokens // self.patch_tokens)

    def per_token(self, of_patch: Tensor) -> Tensor:
        """[patches, ...] to [tokens, ...]."""
        return of_patch.repeat_interleave(self.patch_tokens, 0)[: self.tokens]


@dataclass(frozen=True, slots=True)
class Heads:
    """How many query and KV heads attend, and how wide they are.

    Raises:
        ValueError: query heads that no whole number of GQA groups makes.
    """

    query: int
    kv: int
    dim: int

    def __post_init__(self) -> None:
        if self.query % self.kv:
            raise ValueError(f"{self.query} query heads are no multiple of {self.kv} KV heads")

    @property
    def queries_per_kv(self) -> int:
        return self.query // self.kv


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What attends, in every layer. q: [q_heads, tokens, head_dim]; k, v: [kv_heads, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class _Codes:
    """What the keys of one KV head carry; [tokens, head_dim] or as stated.

    Attributes:
        sink: [head_dim], of the first keys.
        needle: 0 but for needles.
        wanted: of a needle before each query.
        content: of each token.
    """

    sink: Tensor
    drift: Tensor
    grid: Tensor
    needle: Tensor
    wanted: Tensor
    content: Tensor


def video_attention(
    frames: Frames,
    heads: Heads,
    *,
    dtype: torch.dtype,
    device: torch.device,
    spread: float = SPREAD,
    mixed: bool = False,
    seed: int = 0,
) -> AttentionInputs:
    """Equal arguments give equal tensors on one device.

    Args:
        spread: standard deviation of the noise in queries and keys.
        mixed: all kinds of heads in each GQA group.
    """
    rng = torch.Generator(device).manual_seed(seed)
    tokens = frames.tokens
    head_dim = heads.dim
    q = torch.empty(heads.query, tokens, head_dim, dtype=dtype, device=device)
    k, v = torch.empty(2, heads.kv, tokens, head_dim, dtype=dtype, device=device)
    unit = head_dim**0.25  # times itself, and the scale of attention, 1
    position = torch.arange(tokens, device=device)
    for head in range(heads.kv):
        codes = _codes(frames, head_dim, rng, device)
        key = AMPLITUDE["drift"] * codes.drift + AMPLITUDE["grid"] * codes.grid
        key += AMPLITUDE["needle"] * codes.needle
        key += AMPLITUDE["content"] * codes.content
        key[:SINKS] = AMPLITUDE["sink"] * codes.sink
        # Channels that are large in all keys, as in rotary keys with a bias. No softmax sees them.
        offset = torch.zeros(head_dim, device=device)
        offset[torch.randperm(head_dim, generator=rng, device=device)[:3]] = 5.0
        mix = _normal(rng, device, head_dim, head_dim) / math.sqrt(head_dim)
        v[head] = key @ mix * unit + 0.3 * _normal(rng, device, tokens, head_dim)
        k[head] = unit * (key + spread * _normal(rng, device, tokens, head_dim)) + offset
        first = head * heads.queries_per_kv
        for row in range(first, first + heads.queries_per_kv):
            kind = KINDS[(row if mixed else head) % len(KINDS)]
            want = _wanted(codes, GAINS[kind], position)
            q[row] = unit * (want + spread * _normal(rng, device, tokens, head_dim))
    return AttentionInputs(q, k, v)


def _wanted(codes: _Codes, gains: dict[str, float], position: Tensor) -> Tensor:
    """[tokens, head_dim] of one query head."""
    length = (position + 1.0).log()[:, None]
    sinks = length + gains["sink"] if "sink" in gains else 0 * length + gains["anchor"]
    want = (sinks - math.log(SINKS)) / AMPLITUDE["sink"] * codes.sink
    for name, code in (("drift", codes.drift), ("grid", codes.grid), ("content", codes.content)):
        want += gains[name] / AMPLITUDE[name] * code
    if "needle" in gains:
        want += (length + gains["needle"]) / AMPLITUDE["needle"] * codes.wanted
    return want


def _codes(frames: Frames, head_dim: int, rng: torch.Generator, device: torch.device) -> _Codes:
    """Of unit length, in subspaces that are orthogonal to each other."""
    # Sinks are a matter of a few channels (Massive Activations, arXiv 2402.17762): of one, here.
    channel, *others = torch.randperm(head_dim, generator=rng, device=device).tolist()
    basis = torch.zeros(len(others), head_dim, device=device)
    basis[:, others] = torch.linalg.qr(_normal(rng, device, len(others), len(others))).Q
    sink = torch.zeros(head_dim, device=device)
    sink[channel] = 1
    quarter = len(others) // 4
    sizes = [quarter, quarter, quarter, min(16, quarter)]
    drift, grid, needle, content, _ = basis.split([*sizes, len(others) - sum(sizes)])
    cuts = _cuts(frames, rng, device)
    state = frames.per_token(_drift(frames, cuts, len(drift), rng=rng, device=device))
    place = _fields(frames, 1, len(grid), rng=rng, device=device)[0]
    index = torch.arange(frames.tokens, device=device)
    needles, wanted = _needles(frames, len(needle), rng, device)
    return _Codes(
        sink=sink,
        drift=state @ drift,
        grid=place[index % frames.patch_tokens] @ grid,
        needle=needles @ needle,
        wanted=wanted @ needle,
        content=_content(frames, cuts, len(content), rng=rng, device=device) @ content,
    )


def _normal(rng: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, device=device)


def _unit(rng: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    """Random directions, [..., dim] of norm 1."""
    return torch.nn.functional.normalize(_normal(rng, device, *shape), dim=-1)


def _cuts(frames: Frames, rng: torch.Generator, device: torch.device) -> Tensor:
    """[patches] bool: where a scene begins."""
    dice = torch.rand(frames.patches, generator=rng, device=device)
    cuts = dice < 1 / SCENE_PATCHES
    cuts[0] = True
    return cuts


def _drift(
    frames: Frames, cuts: Tensor, dims: int, *, rng: torch.Generator, device: torch.device
) -> Tensor:
    """[patches, dims]: a walk through the scene, and a part that its other shots have, too."""
    count = 1 + frames.patches // (2 * SCENE_PATCHES)  # so that every other one was there before
    scenes = _unit(rng, device, count, dims)
    which = torch.randint(count, (frames.patches,), generator=rng, device=device)
    walk = _autoregression(_unit(rng, device, frames.patches, dims), 0.9, cuts)
    last_cut = torch.where(cuts, torch.arange(frames.patches, device=device), 0).cummax(0).values
    return torch.nn.functional.normalize(0.4 * scenes[which[last_cut]] + walk, dim=-1)


def _content(
    frames: Frames, cuts: Tensor, dims: int, *, rng: torch.Generator, device: torch.device
) -> Tensor:
    """[tokens, dims] of norm 1: what is seen at a place, most of it as in the patch before."""
    seen = _autoregression(_fields(frames, frames.patches, dims, rng=rng, device=device), 0.9, cuts)
    return torch.nn.functional.normalize(seen, dim=-1).flatten(0, 1)[: frames.tokens]


def _fields(
    frames: Frames, count: int, dims: int, *, rng: torch.Generator, device: torch.device
) -> Tensor:
    """[count, patch_tokens, dims] of norm 1: random, but neighbours in a frame are alike."""
    rows = -(-frames.patch_tokens // frames.columns)
    noise = _normal(rng, device, count * dims, 1, rows, frames.columns)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=device)
    kernel = (kernel[:, None] * kernel)[None, None]
    for _ in range(SMOOTHINGS):
        noise = torch.nn.functional.conv2d(noise, kernel, padding=1)
    fields = noise.view(count, dims, -1)[..., : frames.patch_tokens].transpose(1, 2)
    return torch.nn.functional.normalize(fields, dim=-1)


def _autoregression(fresh: Tensor, keep: float, cuts: Tensor) -> Tensor:
    """x[t] = keep * x[t-1] + sqrt(1 - keep^2) * fresh[t], and fresh[t] after a cut; in place."""
    begins = cuts.tolist()
    for t in range(1, len(fresh)):
        if not begins[t]:
            fresh[t].mul_(math.sqrt(1 - keep**2)).add_(fresh[t - 1], alpha=keep)
    return fresh


def _needles(
    frames: Frames, dims: int, rng: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What keys carry and what queries want, each [tokens, dims]."""
    tokens = frames.tokens
    count = max(2, tokens // NEEDLE_EVERY)
    at = torch.randint(tokens, (count,), generator=rng, device=device).sort().values
    codes = _unit(rng, device, count, dims)
    keys = torch.zeros(tokens, dims, device=device)
    keys[at] = codes
    earlier = torch.searchsorted(at, torch.arange(tokens, device=device))
    dice = torch.rand(2, tokens, generator=rng, device=device)
    choice = (dice[0] * earlier).long().clamp(max=count - 1)
    wants = (dice[1] < 1 / WANTED_BY) & (earlier > 0)
    return keys, codes[choice] * wants[:, None]
