"""transformers' own model classes, with attention and KV routed to the engine.

No modelling file is copied: the family's vision tower and language model run as they are,
attention goes through ``AttentionInterface``, keys and values through a ``Cache``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from prefill_service.attention_shape import dtype_name
from prefill_service.compat import ensure_torchvision
from prefill_service.models.checkpoint import Checkpoint
from prefill_service.models.families.base import VisionFeatures, VisionInput
from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.layers.chunked_mlp import limit_rows
from prefill_service.models.layers.packed_linear import can_pack, pack_linears
from prefill_service.models.layers.vision_attention import VISION_ATTENTION, varlen_attention
from prefill_service.models.pixels import FramePreprocessor
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.models.weights.loading import load_model

ensure_torchvision()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AttentionInterface, AutoVideoProcessor  # noqa: E402
from transformers.cache_utils import Cache  # noqa: E402

ATTENTION_NAME = "prefill_service"
ATTENTION_IMPLEMENTATION = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}


class LayerKV(Protocol):
    """Where a layer's keys and values go, and who attends to them."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take [tokens, kv_heads, head_dim] keys (after rotary embedding) and values."""

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """[q_heads, tokens, head_dim] queries to the attention output of the same shape."""


class PrefillModel:
    """Vision tower and language model of one checkpoint on one rank.

    Args:
        checkpoint: which.
        dtype: of weights and KV.
        device: where.
        mlp_chunk_tokens: tokens that an MLP or norm takes at once; 0 for all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        mlp_chunk_tokens: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.shape = replace(checkpoint.shape, dtype=dtype_name(dtype))
        self.dtype = dtype
        self.device = device
        self._family = FAMILIES[checkpoint.family]
        AttentionInterface.register(ATTENTION_NAME, _attention)
        AttentionInterface.register(VISION_ATTENTION, varlen_attention)
        model, self._video_processor = self._load()
        self._model: Any = model.to(device).eval()
        names = self._family.modules
        self._language: Any = self._model.get_submodule(names.language_model)
        self._family.speed_up(self._model)
        if can_pack(device, dtype):
            pack_linears(self._model, names.activated)
        if mlp_chunk_tokens:
            limit_rows(self._language.layers, mlp_chunk_tokens, names)
            patches = mlp_chunk_tokens * self._family.patches_per_token(self._model.config)
            limit_rows(self._model.get_submodule(names.vision_blocks), patches, names)
        self.attention_scale = float(self._language.layers[0].self_attn.scaling)

    def _load(self) -> tuple[Any, Any]:
        """transformers' model, attention routed out, and its video processor."""
        model = load_model(
            self.checkpoint.path,
            self.checkpoint.fp8,
            dtype=self.dtype,
            attn_implementation=ATTENTION_IMPLEMENTATION,
        )
        processors: Any = AutoVideoProcessor
        return model, processors.from_pretrained(self.checkpoint.path)

    def preprocessor(self, plan: PrefixPlan) -> FramePreprocessor:
        """Frames to patches, for this plan's size."""
        return FramePreprocessor(self._family, self._video_processor, plan.resized_hw)

    @torch.inference_mode()
    def encode(self, inputs: VisionInput) -> VisionFeatures:
        """Run the vision tower. Temporal patches are independent of each other in it.

        Args:
            inputs: some temporal patches, as ``FramePreprocessor`` makes them.
        """
        on_device = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return self._family.encode(self._model, on_device)

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: np.ndarray,
        position_ids: np.ndarray,
        video_token_id: int,
        *,
        features: Sequence[VisionFeatures],
        kv: LayerKV,
    ) -> None:
        """Compute every layer's K and V of some tokens; ``kv`` gets them and attends.

        After the last layer's keys and values nothing of the prefix is observable any more, so
        its attention, MLP and the final norm are not computed.

        Args:
            token_ids: [tokens].
            position_ids: [axes, tokens].
            video_token_id: marks the vision tokens among them.
            features: their features, in order.
            kv: sink and attention.
        """
        ids = torch.from_numpy(token_ids).to(self.device, torch.long)
        mask = ids == video_token_id
        language = self._language
        embeds = language.embed_tokens(ids)  # [tokens, hidden]
        deepstack: list[Tensor] = []
        if features:
            embeds[mask] = torch.cat([f.embeds for f in features]).to(embeds.dtype)
            layers = zip(*(f.deepstack for f in features), strict=True)
            deepstack = [torch.cat(layer) for layer in layers]
        try:
            language(
                inputs_embeds=embeds[None],
                past_key_values=_KVBridge(kv, self.shape.attending_layers),
                use_cache=True,
                layer_kv=kv,
                **self._family.language_kwargs(
                    torch.from_numpy(position_ids).to(self.device), mask, deepstack
                ),
            )
        except _PrefixComplete:
            return
        raise AssertionError("the language model ended without its last layer's keys")


class _PrefixComplete(Exception):
    """Leaves the language model once the last layer's keys and values are stored."""


class _KVBridge(Cache):
    """A transformers cache that hands keys and values on and keeps nothing."""

    def __init__(self, kv: LayerKV, last_layer: int) -> None:
        super().__init__(layers=[])
        self._kv = kv
        self._last_layer = last_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Take [1, kv_heads, tokens, head_dim] keys and values of one layer."""
        k, v = (x[0].transpose(0, 1) for x in (key_states, value_states))
        self._kv.store(layer_idx, k, v)
        if layer_idx == self._last_layer:
            raise _PrefixComplete
        return key_states, value_states


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_mask: Any,
    scaling: float,
    layer_kv: LayerKV,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' ``AttentionInterface`` calls: attention is that of ``layer_kv``.

    Takes query [1, q_heads, tokens, head_dim], gives [1, tokens, q_heads, head_dim].
    """
    out = layer_kv.attend(module.layer_idx, query[0], scaling)
    return out.transpose(0, 1)[None], None
