"""Where K and V of a chunk's tokens go: from the rank that computes a token to its owner."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefill_service.parallel.exchanges.demand.owned_kv import OwnedKV
from prefill_service.parallel.exchanges.demand.owners import OwnerMap
from prefill_service.parallel.process_group import SPGroup
from prefill_service.parallel.token_layout import Share, chunk_range


class ChunkRoutes:
    """One chunk as one rank sees it; the same for all layers.

    Args:
        chunk: the share of every rank.
        owners: of the prompt.
        group: the ranks.

    Attributes:
        chunk_start, chunk_end: tokens of the chunk.
        start, end: tokens of this rank's share.
    """

    def __init__(self, chunk: tuple[Share, ...], owners: OwnerMap, group: SPGroup) -> None:
        self._group = group
        ranges = [share.contiguous for share in chunk]
        rank = group.rank
        self.chunk_start, self.chunk_end = chunk_range(chunk)
        self.start, self.end = ranges[rank]
        tokens = [np.arange(start, end) for start, end in ranges]
        owner = [owners.owners_of(of_rank) for of_rank in tokens]
        others = [other for other in range(group.size) if other != rank]
        # Rows of this rank's share that other ranks own.
        self._leaving = {r: torch.from_numpy(np.flatnonzero(owner[rank] == r)) for r in others}
        # Rows of this rank's buffer for tokens that others compute.
        self._arriving = {
            r: torch.from_numpy(owners.owner_rows(tokens[r][owner[r] == rank])) for r in others
        }
        stays = owner[rank] == rank
        self._staying = torch.from_numpy(np.flatnonzero(stays))
        self._staying_rows = torch.from_numpy(owners.owner_rows(tokens[rank][stays]))

    def send_to_owners(self, kv: Tensor, owned: OwnedKV) -> None:
        """Give every token of the chunk to its owner; take in those that this rank owns.

        Args:
            kv: [tokens, 2, kv_heads, head_dim] of this rank's share.
            owned: this rank's, of the same layer.
        """
        owned.store_rows(self._staying_rows, kv[self._staying])
        received = {
            r: kv.new_empty((len(rows), *kv.shape[1:])) for r, rows in self._arriving.items()
        }
        leaving = {r: kv[rows] for r, rows in self._leaving.items()}
        self._group.send_recv(leaving, received, "owners").wait()
        for r, rows in self._arriving.items():
            owned.store_rows(rows, received[r])
