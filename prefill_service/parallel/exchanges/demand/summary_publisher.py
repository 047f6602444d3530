"""Block summaries for all ranks: every owner publishes those of its blocks.

Ranks of a chunk see clustered order up to different places, so the summaries of a chunk's newly
clustered blocks are kept apart from a rank's own until its queries see those blocks so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention_shape import PromptShape, summary_width
from prefill_service.parallel.exchanges.demand.owned_kv import OwnedKV
from prefill_service.parallel.exchanges.demand.owners import OwnerMap
from prefill_service.parallel.process_group import SPGroup


@dataclass(frozen=True, slots=True)
class _PublishedBlocks:
    """Summaries of the blocks that were published in clustered order in one chunk.

    Attributes:
        ids: [n] blocks of the prompt.
        summaries: of them.
    """

    ids: np.ndarray
    summaries: BlockSummaries


class SummaryPublisher:
    """What all ranks know of one layer's blocks.

    Args:
        group: the ranks.
        owners: of the prompt.
        owned: this rank's blocks of the layer.
        shape: of the model's attention.

    Attributes:
        raster_blocks: blocks before this one are published in prompt order.
        clustered_blocks: blocks before this one are published in clustered order.
    """

    def __init__(
        self, group: SPGroup, owners: OwnerMap, owned: OwnedKV, shape: PromptShape
    ) -> None:
        self._group = group
        self._owners = owners
        self._owned = owned
        self._shape = shape
        self._published_blocks: _PublishedBlocks | None = None
        self.raster_blocks = 0
        self.clustered_blocks = 0

    def publish(self, summaries: BlockSummaries, raster: range, clustered: range) -> None:
        """Send the summaries of this rank's blocks to all, and receive the others'.

        Every rank calls it with the same ranges.

        Args:
            summaries: of all complete blocks; gets those in prompt order.
            raster, clustered: blocks to publish in one order and in the other; blocks before their
                ends are published then.
        """
        raster_ids = self._owned_ids(raster)
        clustered_ids = self._owned_ids(clustered)
        packed, is_clustered = self._gather(raster_ids, clustered_ids, summaries.k_mean.dtype)
        ids = torch.from_numpy(np.concatenate(raster_ids))
        summaries.scatter(ids, BlockSummaries.unpack(packed[:, ~is_clustered]))
        self._published_blocks = _PublishedBlocks(
            np.concatenate(clustered_ids), BlockSummaries.unpack(packed[:, is_clustered])
        )
        self.raster_blocks = raster.stop
        self.clustered_blocks = clustered.stop

    def copy_clustered(self, summaries: BlockSummaries, first: int, end: int) -> None:
        """Overwrite ``summaries`` of blocks [first, end) by those in clustered order.

        The blocks are of the last ``publish``.
        """
        published = self._published_blocks
        assert published is not None, "blocks are seen in clustered order once that is published"
        new = torch.from_numpy((published.ids >= first) & (published.ids < end))
        summaries.scatter(torch.from_numpy(published.ids)[new], published.summaries.of_blocks(new))

    def _owned_ids(self, blocks: range) -> list[np.ndarray]:
        """Per rank, those of some blocks of the prompt that it owns."""
        owned = [self._owners.block_ids(rank) for rank in range(self._group.size)]
        return [ids[(ids >= blocks.start) & (ids < blocks.stop)] for ids in owned]

    def _gather(
        self, raster_ids: list[np.ndarray], clustered_ids: list[np.ndarray], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """[kv_heads, blocks, summary_width(head_dim)] packed summaries, rank by rank.

        Also [blocks] bool, those in clustered order: of each rank the last ones.
        """
        shape = self._shape
        rank = self._group.rank
        counts = [len(a) + len(b) for a, b in zip(raster_ids, clustered_ids, strict=True)]
        sizes = [(shape.kv_heads, count, summary_width(shape.head_dim)) for count in counts]
        packed = [torch.empty(size, dtype=dtype, device=shape.device) for size in sizes]
        if counts[rank]:
            packed[rank].copy_(self._owned.packed_summaries(raster_ids[rank], clustered_ids[rank]))
        for pending in self._group.all_gather_v(packed):
            pending.wait()
        is_clustered = [
            torch.arange(count) >= len(ids) for count, ids in zip(counts, raster_ids, strict=True)
        ]
        return torch.cat(packed, 1), torch.cat(is_clustered)
