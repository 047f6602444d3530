"""Keys and values of the blocks at home on one rank, in the order in which they are asked for.

A rank sees segments in clustered order as far as its own queries allow, and ranks of a chunk have
queries in different places. So between the first and the last of them a segment is wanted in both
orders: it is clustered *ahead*, aside, and in place once nobody asks for prompt order any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.attention_shape import AttentionShape
from prefill_service.attention.settings import Segments
from prefill_service.attention.sparse.clustering import order_segments
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.parallel.exchanges.demand.owners import OwnerMap


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A segment in clustered order.

    Attributes:
        blocks: which of this rank's blocks it is.
        kv: [blocks, block_tokens, 2, kv_heads, head_dim].
        order: [kv_heads, segment_tokens], where in the segment each row comes from.
        summaries: of the blocks.
        raster_mean: [kv_heads, blocks, head_dim], mean keys in prompt order.
    """

    blocks: slice
    kv: Tensor
    order: Tensor
    summaries: BlockSummaries
    raster_mean: Tensor


class OwnedKV:
    """One rank's blocks of all layers.

    Args:
        homes, rank: which blocks are at home here.
        shape: of the model's attention.
        segments: sizes of blocks and segments.
    """

    def __init__(
        self, homes: OwnerMap, rank: int, shape: AttentionShape, segments: Segments
    ) -> None:
        self._homes, self._rank, self._sizes = homes, rank, segments
        block = (segments.block_tokens, 2, shape.kv_heads, shape.head_dim)
        count = len(homes.ids(rank))
        # Zeros, because the last block may never be full.
        self._own = [
            torch.zeros((count, *block), dtype=shape.dtype, device=shape.device)
            for _ in range(shape.num_layers)
        ]
        self._ahead: list[dict[int, _Ahead]] = [{} for _ in range(shape.num_layers)]

    def put(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Take in tokens: ``kv`` is [tokens, 2, kv_heads, head_dim]."""
        self._own[layer].flatten(0, 1)[rows] = kv

    def rows(self, layer: int, blocks: int) -> Tensor:
        """[keys, 2, kv_heads, head_dim] of the first so many blocks.

        In prompt order from the first segment on that is not clustered for all.
        """
        return self._own[layer][:blocks].flatten(0, 1)

    def cluster(self, layer: int, start: int, end: int) -> None:
        """Order the segments of tokens [start, end) that are at home here, aside."""
        size = self._sizes.segment_tokens
        for first in range(start, end, size):
            if self._homes.segment_home[first // size] == self._rank:
                self._ahead[layer][first] = self._clustered(layer, first)

    def settle(self, layer: int, before: int) -> None:
        """Nobody wants prompt order of segments before a token any more."""
        for first in [first for first in self._ahead[layer] if first < before]:
            ahead = self._ahead[layer].pop(first)
            self._own[layer][ahead.blocks] = ahead.kv

    def blocks(self, layer: int, wanted: Tensor, clustered: int) -> Tensor:
        """Blocks as a rank wants them that sees clustered order before token ``clustered``.

        Args:
            wanted: [kv_heads, own blocks] bool.

        Returns:
            [count, block_tokens, 2, head_dim].
        """
        heads, slots = wanted.nonzero(as_tuple=True)
        found: Tensor = self._own[layer][slots, :, :, heads]
        for first, ahead in self._ahead[layer].items():
            span = ahead.blocks
            if first >= clustered:
                continue
            inside = ((slots >= span.start) & (slots < span.stop)).nonzero()[:, 0]
            if len(inside):
                found[inside] = ahead.kv[slots[inside] - span.start, :, :, heads[inside]]
        return found

    def summaries(self, layer: int, raster: np.ndarray, clustered: np.ndarray) -> Tensor:
        """Summaries of some of this rank's blocks, by their ids in the prompt.

        Args:
            raster: those in prompt order.
            clustered: those in the order of ``cluster``, of whole segments not yet settled.

        Returns:
            Packed, [kv_heads, blocks, 4 * head_dim + 1].
        """
        block = self._sizes.block_tokens
        slots = torch.from_numpy(self._homes.rows(raster * block) // block)
        k, v = self._own[layer][slots].flatten(0, 1).permute(1, 2, 0, 3)
        found = [summarize(k, v, block).pack()]
        starts = np.unique(clustered * block // self._sizes.segment_tokens)
        ahead = self._ahead[layer]
        found += [ahead[s * self._sizes.segment_tokens].summaries.pack() for s in starts]
        return torch.cat(found, 1)

    def as_seen(
        self, layer: int, means: Tensor, clustered: int
    ) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """This rank's blocks as a rank sees them: arguments as of ``blocks``.

        Args:
            means: [kv_heads, own blocks, head_dim] mean keys in any order; overwritten where they
                depend on it.

        Returns:
            ``means``, and for every segment that is in another order than ``rows``, its first row
            and its order [kv_heads, segment_tokens].
        """
        orders = []
        for first, ahead in self._ahead[layer].items():
            ordered = first < clustered
            means[:, ahead.blocks] = ahead.summaries.k_mean if ordered else ahead.raster_mean
            if ordered:
                orders.append((ahead.blocks.start * self._sizes.block_tokens, ahead.order))
        return means, orders

    def _clustered(self, layer: int, start: int) -> _Ahead:
        sizes, block = self._sizes, self._sizes.block_tokens
        first = int(self._homes.rows(np.array([start]))[0]) // block
        blocks = slice(first, first + sizes.segment_tokens // block)
        raster = self._own[layer][blocks].flatten(0, 1)  # [segment, 2, kv_heads, head_dim]
        fixed = 0 if start else sizes.fixed_tokens
        k, v = raster.permute(1, 2, 0, 3)
        order = order_segments(k, block, sizes.segment_tokens, fixed)
        kv = torch.empty_like(raster)
        for head, rows in enumerate(order):
            kv[:, :, head] = raster[rows, :, head]
        summaries = summarize(kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1), block)
        mean = summarize(k, v, block).k_mean
        return _Ahead(blocks, kv.view_as(self._own[layer][blocks]), order, summaries, mean)
