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
from prefill_service.calibration.prefix import EncodedVideo
from prefill_service.models.prefill_model import PrefillModel


class LocalPrefill:
    """One prefill of one video; the model's ``LayerKV``.

    Args:
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
        only: int | None = None,
        keep: bool = False,
    ) -> None:
        checkpoint = model.checkpoint
        self._model, self._video, self._only = model, video, only
        self._layers = checkpoint.num_layers - 1  # the last one's attention is never needed
        self._shape = (video.plan.num_tokens, 2, checkpoint.num_kv_heads, checkpoint.head_dim)
        self._replica = [self._empty() for _ in range(self._layers)]
        self._attention = AdaptiveAttention(
            settings, policy, self._layers, checkpoint.num_kv_heads, checkpoint.head_dim,
            model.dtype, model.device, video.plan.patch_ends,
        )  # fmt: skip
        self._start = self._end = 0
        self.pages = [self._empty() for _ in range(checkpoint.num_layers)] if keep else []
        """Per layer [tokens, 2, kv_heads, head_dim]."""

    def run(self) -> list[LayerReport]:
        """Prefill the video; what was measured per layer that attends."""
        plan = self._video.plan
        for (start, end), features in zip(self._video.chunks, self._video.features, strict=True):
            self._start, self._end = start, end
            self._model.prefill(
                plan.token_ids[start:end],
                plan.position_ids[:, start:end],
                plan.video_token_id,
                features=[features],
                kv=self,
            )
        return self._attention.report().layers

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take [tokens, kv_heads, head_dim] keys and values of the chunk."""
        fused = torch.stack([k, v], 1)
        if layer < self._layers:
            self._replica[layer][self._start : self._end] = fused
        if self.pages:
            self.pages[layer][self._start : self._end] = fused

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """[q_heads, tokens, head_dim] queries of the chunk, to all before them."""
        start, kv = self._start, self._replica[layer]
        approximate = self._only is None or layer == self._only
        if approximate and self._attention.is_sparse(start, q.shape[1]):
            return self._attention.attend(layer, q, kv, start, scale)
        k, v = kv[: start + q.shape[1]].permute(1, 2, 0, 3)
        if approximate:
            self._attention.observe(layer, q, kv, start, scale)
        clock = Stopwatch(q.device)
        out = attend_causal(q, k, v, start, scale).out
        clock.lap("attend")
        self._attention.attended(layer, clock.seconds("attend"))
        return out

    def _empty(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._model.dtype, device=self._model.device)
