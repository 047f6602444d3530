"""Keys and values of the blocks that one rank owns, in the order in which they are asked for.

A rank sees segments in clustered order as far as its own queries allow, and ranks of a chunk have
queries in different places. So between the first and the last of them a segment is wanted in both
orders: its clustered copy is kept beside it, and replaces it once nobody asks for prompt order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.settings import Segments
from prefill_service.attention.sparse.clustering import order_segments
from prefill_service.attention.sparse.summaries import BlockSummaries, summarize
from prefill_service.attention_shape import PromptShape
from prefill_service.parallel.exchanges.demand.owners import OwnerMap


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClusteredSegment:
    """A copy of a segment in clustered order.

    Attributes:
        slots: which of this rank's blocks the segment is.
        kv: [blocks, block_tokens, 2, kv_heads, head_dim].
        order: [kv_heads, segment_tokens], where in the segment each row comes from.
        summaries: of the blocks.
        raster_mean: [kv_heads, blocks, head_dim], mean keys in prompt order.
    """

    slots: slice
    kv: Tensor
    order: Tensor
    summaries: BlockSummaries
    raster_mean: Tensor


@dataclass(frozen=True, slots=True)
class KeyOrder:
    """A run of stored keys that another rank sees in another order.

    Attributes:
        first_row: of the run, among the stored keys.
        order: [kv_heads, segment_tokens], where in the run each of its keys comes from.
    """

    first_row: int
    order: Tensor


class OwnedKV:
    """One rank's blocks of one layer.

    Args:
        owners, rank: which blocks these are.
        shape: of the model's attention.
        segments: sizes of blocks and segments.
    """

    def __init__(self, owners: OwnerMap, rank: int, shape: PromptShape, segments: Segments) -> None:
        self._owners = owners
        self._rank = rank
        self._segments = segments
        size = (
            len(owners.block_ids(rank)),
            segments.block_tokens,
            2,
            shape.kv_heads,
            shape.head_dim,
        )
        # Zeros, because the last block may never be full.
        self._blocks = torch.zeros(size, dtype=shape.torch_dtype, device=shape.device)
        self._clustered: dict[int, _ClusteredSegment] = {}  # by the segment's first token

    def store_rows(self, rows: Tensor, kv: Tensor) -> None:
        """Store tokens: ``kv`` is [tokens, 2, kv_heads, head_dim]."""
        self._blocks.flatten(0, 1)[rows] = kv

    def stored_keys(self, blocks: int) -> Tensor:
        """[keys, 2, kv_heads, head_dim] of the first so many blocks.

        In prompt order, but for segments whose clustered copy has replaced them.
        """
        return self._blocks[:blocks].flatten(0, 1)

    def cluster_segments(self, start: int, end: int) -> None:
        """Make a clustered copy of the segments of tokens [start, end) that this rank owns."""
        size = self._segments.segment_tokens
        for first in range(start, end, size):
            if self._owners.segment_owner[first // size] == self._rank:
                self._clustered[first] = self._cluster(first)

    def drop_prompt_order(self, before: int) -> None:
        """Replace segments before a token by their clustered copies: nobody wants prompt order."""
        for first in [first for first in self._clustered if first < before]:
            segment = self._clustered.pop(first)
            self._blocks[segment.slots] = segment.kv

    def select_blocks(self, wanted: Tensor, clustered_until: int) -> Tensor:
        """Blocks for a rank that sees clustered order before token ``clustered_until``.

        Args:
            wanted: [kv_heads, own blocks] bool.

        Returns:
            [count, block_tokens, 2, head_dim].
        """
        heads, slots = wanted.nonzero(as_tuple=True)
        found: Tensor = self._blocks[slots, :, :, heads]
        for first, segment in self._clustered.items():
            held = segment.slots
            if first >= clustered_until:
                continue
            inside = ((slots >= held.start) & (slots < held.stop)).nonzero()[:, 0]
            if len(inside):
                found[inside] = segment.kv[slots[inside] - held.start, :, :, heads[inside]]
        return found

    def packed_summaries(self, raster: np.ndarray, clustered: np.ndarray) -> Tensor:
        """Summaries of some of this rank's blocks, by their ids in the prompt.

        Args:
            raster: those in prompt order.
            clustered: those in clustered order, of whole segments that still have a copy.

        Returns:
            Packed, [kv_heads, blocks, summary_width(head_dim)].
        """
        block = self._segments.block_tokens
        size = self._segments.segment_tokens
        slots = torch.from_numpy(self._owners.owner_rows(raster * block) // block)
        k, v = self._blocks[slots].flatten(0, 1).permute(1, 2, 0, 3)
        found = [summarize(k, v, block).pack()]
        starts = np.unique(clustered * block // size)
        found += [self._clustered[start * size].summaries.pack() for start in starts]
        return torch.cat(found, 1)

    def apply_order(self, means: Tensor, clustered_until: int) -> list[KeyOrder]:
        """What differs for a rank that sees clustered order before token ``clustered_until``.

        Args:
            means: [kv_heads, own blocks, head_dim] mean keys in any order; overwritten where they
                depend on it.

        Returns:
            Every segment that this rank sees in another order than ``stored_keys``.
        """
        orders = []
        for first, segment in self._clustered.items():
            if first < clustered_until:
                means[:, segment.slots] = segment.summaries.k_mean
                first_row = segment.slots.start * self._segments.block_tokens
                orders.append(KeyOrder(first_row, segment.order))
            else:
                means[:, segment.slots] = segment.raster_mean
        return orders

    def _cluster(self, start: int) -> _ClusteredSegment:
        sizes = self._segments
        block = sizes.block_tokens
        first = int(self._owners.owner_rows(np.array([start]))[0]) // block
        slots = slice(first, first + sizes.segment_tokens // block)
        raster = self._blocks[slots].flatten(0, 1)  # [segment, 2, kv_heads, head_dim]
        fixed = 0 if start else sizes.fixed_tokens
        k, v = raster.permute(1, 2, 0, 3)
        order = order_segments(k, block, sizes.segment_tokens, fixed)
        kv = torch.empty_like(raster)
        for head, rows in enumerate(order):
            kv[:, :, head] = raster[rows, :, head]
        return _ClusteredSegment(
            slots=slots,
            kv=kv.view_as(self._blocks[slots]),
            order=order,
            summaries=summarize(kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1), block),
            raster_mean=summarize(k, v, block).k_mean,
        )
