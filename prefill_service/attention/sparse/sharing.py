"""What sparse attention asks of whoever can have other ranks attend to a part of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from prefill_kernels.csr import BlockCSR
from torch import Tensor

from prefill_service.attention.dense import Partial
from prefill_service.attention.sparse.cpu_backend import GatherBuffers, kept_attention
from prefill_service.attention.sparse.tiles import Tiles


class Shared(Protocol):
    """Kept blocks that other ranks attend to."""

    @property
    def here(self) -> Tensor:
        """[kv_heads, tiles, blocks] bool, those that this rank attends to itself."""

    @property
    def heads(self) -> Tensor:
        """Those KV heads, as indices of ``here``, of which others attend to some."""

    def add(self, result: Partial) -> Partial:
        """Wait for the others' results, and merge them in; of packed rows, in place."""


Share = Callable[[Tensor, Tensor, Tiles, Tensor], Shared | None]
"""See ``KeySource.share``; the KV heads are known."""


def attend_listed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Sequence[Tensor],
    sizes: tuple[int, int],
    scale: float,
    buffers: GatherBuffers,
) -> Partial:
    """What a rank does for others: tiles of one KV head, each over blocks of its own.

    Args:
        q: [n, group * tile_tokens, head_dim] packed queries.
        k, v: [1, keys, head_dim].
        lists: per tile, int32 numbers of blocks.
        sizes: tokens of a tile and of a block.

    Returns:
        Partial of [n, group * tile_tokens, ...].
    """
    starts = [0, *accumulate(len(part) for part in lists)]
    csr = BlockCSR(torch.tensor(starts, dtype=torch.int32), torch.cat(list(lists)))
    tiles = Tiles(len(q) * sizes[0], 0, *sizes)
    part = kept_attention(q[None], k, v, csr, tiles, scale, buffers)
    return Partial(part.out[0], part.lse[0])
