"""The product's model with weights made on the device, and what attends replaced by inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel
from typing_extensions import override

from benchmarks.gpu.prefill.inputs import AttentionInputs
from benchmarks.gpu.prefill.shapes import PublishedModel
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import (
    ATTENTION_IMPLEMENTATION,
    LayerKV,
    PrefillModel,
)
from prefill_service.models.prefix_plan import PrefixPlan

FEATURES = 4099
"""Vision features there are; a prime, so that patches do not repeat."""


class RandomModel(PrefillModel):
    """``PrefillModel`` whose checkpoint is a shape.

    Args:
        layers: decoder layers, of which the last one only makes its keys and values.
        mlp_chunk_tokens: see ``PrefillModel``.
        drawn: precision in which weights are drawn, then converted; ``dtype`` by default. Models
            that share it and the device have the same weights.
    """

    def __init__(
        self,
        shape: PublishedModel,
        layers: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        mlp_chunk_tokens: int,
        drawn: torch.dtype | None = None,
    ) -> None:
        self.preset = shape
        self._drawn = drawn or dtype
        name = str(dtype).removeprefix("torch.")
        torch.manual_seed(0)
        super().__init__(shape.checkpoint(layers, name), dtype, device, mlp_chunk_tokens)

    def _load(self) -> tuple[Any, Any]:
        models: Any = AutoModel
        with torch.device(self.device):
            model = models.from_config(
                self.preset.config(self.shape.num_layers),
                dtype=self._drawn,
                attn_implementation=ATTENTION_IMPLEMENTATION,
            )
        if self._drawn != self.dtype:  # otherwise the rotary frequencies would be rounded, too
            model = model.to(self.dtype)
        return model.requires_grad_(False), None

    def features(self) -> VisionFeatures:
        """Random ones, which vision tokens take in turn; of deepstack, a reduced model's share."""
        rng = torch.Generator(self.device).manual_seed(1)
        size = (FEATURES, self.preset.hidden)
        layers = self.shape.num_layers
        levels = -(-self.preset.deepstack * layers // self.preset.layers)
        embeds, *deepstack = (
            torch.randn(size, generator=rng, dtype=self._drawn, device=self.device).to(self.dtype)
            for _ in range(1 + levels)
        )
        return VisionFeatures(embeds, deepstack)


class Substituted(LayerKV):
    """Hands on generated keys, values and queries in place of the layers', and takes the time.

    Args:
        kv: who keeps and attends.
        start: position of the first token.
        attended: takes each layer's attention output, if anybody wants it.
        stored: takes the layers' own K and V, likewise.
    """

    def __init__(
        self,
        kv: LayerKV,
        inputs: AttentionInputs,
        clock: Stopwatch,
        *,
        attended: list[Tensor] | None = None,
        stored: dict[int, list[Tensor]] | None = None,
    ) -> None:
        self._kv = kv
        self._inputs = inputs
        self._clock = clock
        self._attended = attended
        self._stored = stored
        self.start = 0

    @override
    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self._stored is not None:
            self._stored.setdefault(layer, []).append(torch.stack([k, v], 1))
        mine = slice(self.start, self.start + len(k))
        k, v = (x[:, mine].transpose(0, 1) for x in (self._inputs.k, self._inputs.v))
        self._kv.store(layer, k, v)

    @override
    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        self._clock.lap("layers")
        q = self._inputs.q[:, self.start : self.start + q.shape[1]]
        out = self._kv.attend(layer, q, scale)
        self._clock.lap("attention")
        if self._attended is not None and layer == 0:
            self._attended.append(out)
        return out


def run_chunks(
    model: RandomModel,
    plan: PrefixPlan,
    chunks: Sequence[tuple[int, int]],
    *,
    kv: Substituted,
    features: VisionFeatures,
) -> None:
    """Prefill chunk after chunk, as a rank does.

    Args:
        chunks: first token and one past the last.
        features: ``RandomModel.features``.
    """
    begin = 0
    for start, end in chunks:
        kv.start = start
        ids = plan.token_ids[start:end]
        vision = int(np.count_nonzero(ids == plan.video_token_id))
        mine = torch.arange(begin, begin + vision, device=model.device) % FEATURES
        begin += vision
        parts = VisionFeatures(features.embeds[mine], [level[mine] for level in features.deepstack])
        model.prefill(
            ids, plan.position_ids[:, start:end], plan.video_token_id, features=[parts], kv=kv
        )
