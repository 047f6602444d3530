"""A prefill in this process, as one rank computes it; its KV stays here."""

from __future__ import annotations

import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import LayerReport
from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.calibration.encoded_video import EncodedVideo
from prefill_service.models.prefill_model import PrefillModel


class LocalPrefill:
    """One prefill of one video; the model's ``LayerKV``.

    Args:
        model: to prefill.
        video: whose prefix is prefilled.
        settings: sizes of sparse attention.
        policy: epsilons and floor.
        only: the one layer that is not attended exactly; ``None``: all follow the policy.
        keep: hold the KV in prompt order, too (``pages``).
    """

    def __init__(
        self,
        model: PrefillModel,
        video: EncodedVideo,
        settings: SparseSettings,
        policy: AttentionPolicy,
        *,
        only: int | None = None,
        keep: bool = False,
    ) -> None:
        self._model = model
        self._video = video
        self._only = only
        self._shape = model.shape.of_prompt(
            video.plan.num_tokens, scale=model.attention_scale, device=model.device
        )
        self._replica = [self._empty_layer() for _ in range(self._shape.attending_layers)]
        self._attention = AdaptiveAttention(settings, policy, self._shape, video.plan.patch_ends)
        self._start = 0
        self._end = 0
        self.pages = [self._empty_layer() for _ in range(self._shape.num_layers)] if keep else []
        """Per layer [tokens, 2, kv_heads, head_dim]."""

    def run(self) -> list[LayerReport]:
        """Prefill the video; what was measured per layer that attends."""
        plan = self._video.plan
        for (start, end), features in zip(self._video.chunks, self._video.features, strict=True):
            self._start = start
            self._end = end
            self._model.prefill(
                plan.token_ids[start:end],
                plan.position_ids[:, start:end],
                plan.video_token_id,
                features=[features],
                kv=self,
            )
        return self._attention.stats.report().layers

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take [tokens, kv_heads, head_dim] keys and values of the chunk."""
        fused = torch.stack([k, v], 1)
        if layer < self._shape.attending_layers:
            self._replica[layer][self._start : self._end] = fused
        if self.pages:
            self.pages[layer][self._start : self._end] = fused

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """[q_heads, tokens, head_dim] queries of the chunk, to all before them."""
        start = self._start
        kv = self._replica[layer]
        approximate = self._only is None or layer == self._only
        if approximate and self._attention.is_sparse(start, q.shape[1]):
            return self._attention.attend_unit(layer, q, kv, start=start)
        k, v = kv[: start + q.shape[1]].permute(1, 2, 0, 3)
        if approximate:
            self._attention.observe_exact(layer, q, kv, start=start)
        clock = Stopwatch(q.device)
        out = attend_causal(q, k, v, q_offset=start, scale=scale).out
        clock.lap("attend")
        self._attention.stats.add_attend_seconds(layer, clock.seconds("attend"))
        return out

    def _empty_layer(self) -> Tensor:
        return self._shape.empty(self._shape.num_tokens)
