"""Which queries are measured."""

from __future__ import annotations

from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import choose_rows, sample_rows, sample_tiles


def test_sampled_rows_are_spread_and_differ() -> None:
    first, second = sample_rows(512, 4, 1), sample_rows(512, 4, 2)
    assert first.tolist() != second.tolist()
    for rows in (first, second):
        assert ((rows >= 0) & (rows < 512)).all()
        assert [int(row) // 128 for row in rows] == [0, 1, 2, 3]
    assert sample_rows(3, 8, 5).tolist() == [0, 1, 2]
    assert sample_rows(1, 2, 9).tolist() == [0]
    seen = {int(row) for seed in range(100) for row in sample_rows(64, 2, seed)}
    assert len(seen) > 60


def test_every_tile_is_sampled() -> None:
    tiles = Tiles(300, 1000, 128, 64)
    for per_tile in (1, 3):
        rows = sample_tiles(tiles, per_tile, 5)
        assert [int(row) // 128 for row in rows] == [0] * per_tile + [1] * per_tile + [2] * per_tile
        assert (rows.diff() > 0).all()
        assert rows.max() < 300
    assert (sample_tiles(tiles, 1, 5) % 128).unique().numel() == 3  # each at a place of its own
    assert sample_tiles(Tiles(130, 0, 128, 64), 4, 0)[4:].tolist() == [128, 129]


def test_a_closer_look_is_at_other_rows() -> None:
    settings, tiles = SparseSettings(200), Tiles(512, 1024, 128, 64)
    rows, closer = (set(found.tolist()) for found in choose_rows(settings, tiles, 0))
    assert len(rows) == 8
    assert len(closer) == 24
    assert len(rows & closer) < 4
    others, _ = choose_rows(settings, tiles, 1)  # of the next layer
    assert rows != set(others.tolist())


def test_long_prompts_certify_one_row_of_each_tile() -> None:
    rows, _ = choose_rows(SparseSettings(200), Tiles(512, 8192, 128, 64), 3)
    assert [int(row) // 128 for row in rows] == [0, 1, 2, 3]
