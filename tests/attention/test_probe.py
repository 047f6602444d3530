"""The probe measures the density that it says."""

from __future__ import annotations

import torch

from prefill_service.attention.crossover import _sparse
from prefill_service.attention.sparse.tiles import Tiles


def test_a_quarter_of_the_blocks_is_kept() -> None:
    """Scores of normal keys are so peaked that any finite epsilon would keep far more."""
    q, (k, v) = torch.randn(8, 256, 64), torch.randn(2, 2, 4096, 64)
    tiles = Tiles(256, 4096 - 256, 128, 64)
    keep = _sparse(q, k, v, tiles, 1024)().keep  # [kv_heads, tiles, blocks]
    wanted = torch.arange(tiles.blocks) % 4 == 0
    for tile in range(tiles.count):
        assert (keep[:, tile] == (wanted & (torch.arange(tiles.blocks) < tiles.candidates(tile)))
                ).all()  # fmt: skip
