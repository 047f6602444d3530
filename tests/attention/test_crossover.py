"""The crossover is measured at the density that is said."""

from __future__ import annotations

import torch

from prefill_service.attention.crossover import sparse_chunk
from prefill_service.attention.settings import SparseSettings


def test_a_quarter_of_the_blocks_is_kept() -> None:
    """Scores of normal keys are so peaked that any finite epsilon would keep far more."""
    q = torch.randn(8, 256, 64)
    k, v = torch.randn(2, 2, 4096, 64)
    settings = SparseSettings(1)
    tiles = settings.tiles(4096 - 256, 256)
    keep = sparse_chunk(q, k, v, settings)().keep  # [kv_heads, tiles, blocks]
    wanted = torch.arange(tiles.blocks) % 4 == 0
    for tile in range(tiles.count):
        visible = torch.arange(tiles.blocks) < tiles.candidates(tile)
        assert (keep[:, tile] == (wanted & visible)).all()
