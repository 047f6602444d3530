"""MLPs and norms in pieces: the same bits, from less memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import finalize

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.families.base import ModuleNames, VisionFeatures
from prefill_service.models.layers.chunked_mlp import limit_rows
from prefill_service.models.prefill_model import PrefillModel

TOKENS = 1100
NAMES = ModuleNames(vision_blocks="", norms=(), activated=())
GRID = (4, 16, 16)  # 1,024 patches, 256 tokens


class Allocations(TorchDispatchMode):
    """Live bytes of all storages that operations return, and their highest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


class Keep:
    """A ``LayerKV`` that keeps what it gets and attends to each token's own value only."""

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert layer == len(self.kv)
        self.kv.append((k.clone(), v.clone()))

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        v = self.kv[layer][1].transpose(0, 1)  # [kv_heads, tokens, head_dim]
        return v.repeat_interleave(len(q) // len(v), 0).contiguous()


def prefill(model: PrefillModel, features: VisionFeatures) -> list[tuple[Tensor, Tensor]]:
    video_token = int(model._model.config.video_token_id)
    ids = np.arange(TOKENS, dtype=np.int32) % 50
    ids[100 : 100 + len(features.embeds)] = video_token
    positions = np.tile(np.arange(TOKENS), (3, 1))
    keep = Keep()
    model.prefill(ids, positions, video_token, features=[features], kv=keep)
    return keep.kv


def encode(model: PrefillModel) -> VisionFeatures:
    config = model._model.config.vision_config
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(GRID[0] * GRID[1] * GRID[2], width, generator=generator)
    return model.encode(
        {
            "pixel_values_videos": pixels.to(model.dtype),
            "video_grid_thw": torch.tensor([GRID]),
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_both_towers_give_the_same_bits(
    checkpoint: Callable[..., Path], family: str, dtype: torch.dtype
) -> None:
    opened = open_checkpoint(str(checkpoint(family)))
    whole, pieces = (PrefillModel(opened, dtype, torch.device("cpu"), n) for n in (0, 96))
    features = encode(whole)
    for a, b in zip(
        [features.embeds, *features.deepstack],
        [(other := encode(pieces)).embeds, *other.deepstack],
        strict=True,
    ):
        assert torch.equal(a, b)
    for (k, v), (other_k, other_v) in zip(
        prefill(whole, features), prefill(pieces, features), strict=True
    ):
        assert torch.equal(k, other_k)
        assert torch.equal(v, other_v)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_peak_falls(checkpoint: Callable[..., Path], family: str) -> None:
    opened = open_checkpoint(str(checkpoint(family)))
    peaks = {}
    for rows in (0, 64):
        model = PrefillModel(opened, torch.float32, torch.device("cpu"), rows)
        block = model._model.language_model.layers[0]
        x = torch.randn(1, TOKENS, block.mlp.gate_proj.in_features)
        gc.collect()
        with torch.inference_mode(), Allocations() as allocations:
            block.mlp(block.post_attention_layernorm(x))
        peaks[rows] = allocations.peak
    width = block.mlp.gate_proj.in_features
    inner = block.mlp.gate_proj.out_features
    # Whole: gate, its activation, up and their product beside the norm's output, three at once.
    assert peaks[0] >= 4 * TOKENS * (width + 3 * inner)
    # In pieces: the input, the norm's output and the MLP's, and of 64 rows what there was of all.
    assert peaks[64] <= 4 * TOKENS * 3 * width + 64 / TOKENS * 1.5 * peaks[0]
    assert peaks[64] < peaks[0] / 2


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="0 rows at a time; at least 1"):
        limit_rows([SimpleNamespace(mlp=nn.Identity())], 0, NAMES)
    with pytest.raises(ValueError, match="block 1, a Linear, has no part named"):
        limit_rows([SimpleNamespace(mlp=nn.Identity()), nn.Linear(1, 1)], 8, NAMES)
