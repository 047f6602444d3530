"""Block maps and patch masses against counting pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefill_service.attention.patch_mass import BlockGrids, PatchMass
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import visible_mass
from tests.attention.oracle import rand


@pytest.mark.parametrize("tokens", [1, 700, 1500, 20_000])
def test_dense_and_everything_kept_are_all_causal_pairs(tokens: int) -> None:
    grids = BlockGrids(1, 2, tokens)
    order = torch.arange(tokens).expand(2, -1)
    for start in range(0, tokens, 3000):
        tiles = Tiles(min(3000, tokens - start), start, 128, 64)
        grids.add_causal(tiles)
        keep = torch.zeros(2, tiles.count, tiles.blocks, dtype=torch.bool)
        for tile in range(tiles.count):
            keep[:, tile, : tiles.candidates(tile)] = True
        grids.add_sparse(0, tiles, keep, order)
    assert grids.causal.sum() == pytest.approx(tokens * (tokens + 1) / 2)
    np.testing.assert_allclose(grids.pairs[0, 1], grids.causal)
    assert (grids.causal.sum(1) > 0).all()  # no row of the map without a tile
    again = BlockGrids(1, 2, tokens)
    again.add_dense(0, Tiles(tokens, 0, 128, 64), [1])
    np.testing.assert_allclose(again.pairs[0, 1].sum(), grids.causal.sum(), rtol=1e-6)
    assert not again.pairs[0, 0].any()


def test_kept_blocks_count_where_their_keys_came_from() -> None:
    tokens = 2048
    grids = BlockGrids(2, 1, tokens)  # eight cells of 256
    order = torch.arange(tokens).reshape(1, 8, 256).flip(1).reshape(1, -1)
    tiles = Tiles(128, 1920, 128, 64)
    keep = torch.zeros(1, 1, tiles.blocks, dtype=torch.bool)
    keep[0, 0, 0] = True  # block 0 holds keys of the last cell
    grids.add_sparse(1, tiles, keep, order)
    assert not grids.pairs[0].any()
    expected = np.zeros((8, 8))
    expected[7, 7] = 64 * 128 + 128 * 129 / 2
    np.testing.assert_array_equal(grids.pairs[1, 0], expected)


def test_patch_mass_against_a_loop() -> None:
    ends = np.array([30, 60, 100, 128])
    mass = PatchMass(ends, torch.device("cpu"))
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    order = torch.stack([shuffled, torch.arange(100)])
    position = torch.tensor([70, 99])
    p = rand(2, 6, 100).softmax(-1)  # two KV heads, three query heads each, two samples
    weights = mass.weights(position, 100)
    weighted = torch.stack([visible_mass(head, weights) for head in p])
    mass.add_mass(weighted, 6, position, order=order)
    got, rows = mass.totals()
    expected = np.zeros(4)
    for head in range(2):
        for row in range(6):
            seen = int(position[row % 2]) + 1
            for key in range(60):  # both rows are in the patch [60, 100)
                patch = int(np.searchsorted(ends, int(order[head, key]), side="right"))
                size = np.diff(ends, prepend=0)[patch]
                expected[patch] += float(p[head, row, key]) * seen / size
    np.testing.assert_allclose(got, expected)
    assert rows.tolist() == [12, 12, 0, 0]
    # Samples that stand for twice as many queries count twice.
    mass.add_mass(weighted, 6, position, order=order, stand_for=2.0)
    got, rows = mass.totals()
    np.testing.assert_allclose(got, 3 * expected)
    assert rows.tolist() == [36, 36, 0, 0]
