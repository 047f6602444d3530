"""A prefill in this process: the ranks' own code, one rank after the other.

Causal attention lets ranks of a chunk run in turn: a rank needs the keys of earlier ranks, never
of later ones. Everything that decides the result is the product's: model, layout, attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.dense import attend_causal
from prefill_service.attention.quality import AttentionPolicy
from prefill_service.attention.report import AttentionReport, combine
from prefill_service.attention.settings import SparseSettings
from prefill_service.models.families.base import VisionFeatures
from prefill_service.models.prefill_model import PrefillModel
from prefill_service.parallel.selection_units import SelectionUnits
from prefill_service.parallel.token_layout import Range, Share, deal_patches


@dataclass(frozen=True, slots=True)
class Prefix:
    """A video prefix, ready to be prefilled.

    Attributes:
        token_ids: [tokens].
        position_ids: [3, tokens].
        patch_ends: [patches] one past each temporal patch's last token.
        video_token_id: marks vision tokens.
        features: of all its patches.
        patch_tokens: vision tokens of a patch.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    patch_ends: np.ndarray
    video_token_id: int
    features: VisionFeatures
    patch_tokens: int

    def features_of(self, share: Share) -> list[VisionFeatures]:
        """Those of a share's patches."""
        (piece,) = share.pieces
        part = slice(piece.first_patch * self.patch_tokens, piece.end_patch * self.patch_tokens)
        deepstack = [layer[part] for layer in self.features.deepstack]
        return [VisionFeatures(self.features.embeds[part], deepstack)]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Result of a prefill.

    Attributes:
        kv: per layer [2, kv_heads, tokens, head_dim], keys and values in prompt order.
        report: what the ranks measured.
    """

    kv: list[Tensor]
    report: AttentionReport


def rehearse(
    model: PrefillModel,
    prefix: Prefix,
    policy: AttentionPolicy,
    *,
    ranks: int = 1,
    chunk_tokens: int = 512,
    settings: SparseSettings,
) -> Rehearsal:
    """Prefill ``prefix`` as ``ranks`` ranks would.

    Args:
        chunk_tokens: tokens per chunk and rank.
    """
    tokens = len(prefix.token_ids)
    shape = model.shape.of_prompt(tokens, scale=model.attention_scale, device=model.device)
    buffer = (tokens, *shape.row)
    pages = [torch.empty(buffer, dtype=model.dtype) for _ in range(shape.num_layers)]
    members = [
        _Rank(
            [torch.empty(buffer, dtype=model.dtype) for _ in range(shape.attending_layers)],
            pages,
            AdaptiveAttention(settings, policy, shape, prefix.patch_ends),
        )
        for _ in range(ranks)
    ]
    sparse = not policy.exact and tokens >= settings.from_tokens
    units = SelectionUnits.of(prefix.patch_ends, chunk_tokens)
    layout = deal_patches(prefix.patch_ends, ranks, chunk_tokens, whole_units=sparse)
    for chunk in layout.shares:
        for member, share in zip(members, chunk, strict=True):
            if not share.num_tokens:
                continue
            member.begin(share, units.cut(*share.contiguous), members)
            model.prefill(
                share.select_tokens(prefix.token_ids),
                share.select_tokens(prefix.position_ids),
                prefix.video_token_id,
                features=prefix.features_of(share),
                kv=member,
            )
    report = combine([member.attention.stats.report() for member in members])
    return Rehearsal([page.permute(1, 2, 0, 3) for page in pages], report)


class _Rank:
    """One rank's ``LayerKV``: its replica of all keys and values, and its attention."""

    def __init__(
        self, replica: list[Tensor], pages: list[Tensor], attention: AdaptiveAttention
    ) -> None:
        self.replica = replica
        self.attention = attention
        self._pages = pages
        self._share = Share(())
        self._units = list[Range]()
        self._members: list[_Rank] = []

    def begin(self, share: Share, units: list[Range], members: list[_Rank]) -> None:
        """What comes next is this rank's share of the chunk, which is those units."""
        self._share = share
        self._units = units
        self._members = members

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """To the pages, and to every rank's replica."""
        rows = slice(*self._share.contiguous)
        fused = torch.stack([k, v], 1)  # [tokens, 2, kv_heads, head_dim]
        self._pages[layer][rows] = fused
        if layer < len(self.replica):
            for member in self._members:
                member.replica[layer][rows] = fused

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """As ``engine.pipeline`` does."""
        (begin, _) = self._share.contiguous
        kv = self.replica[layer]
        parts = []
        for start, end in self._units:
            part = q[:, start - begin : end - begin]
            if self.attention.is_sparse(start, end - start):
                parts.append(self.attention.attend_unit(layer, part, kv, start=start))
                continue
            k, v = kv[:end].permute(1, 2, 0, 3)
            parts.append(attend_causal(part, k, v, q_offset=start, scale=scale).out)
            self.attention.observe_exact(layer, part, kv, start=start)
        return torch.cat(parts, 1)
