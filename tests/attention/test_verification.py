"""Verification measures what it says, against every row in float64, and samples every tile."""

from __future__ import annotations

import pytest
import torch

from prefill_service.attention.settings import SparseSettings
from prefill_service.attention.sparse.scratch import ScratchBuffers
from prefill_service.attention.sparse.selection import forced_blocks
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.verification import (
    SampledRows,
    choose_rows,
    measure_rows,
    sample_rows,
    sample_tiles,
    verify_rows,
)
from tests.attention import oracle
from tests.attention.oracle import rand
from tests.attention.problems import attend_on_cpu, sparse_problem

SCALE = 0.3


@pytest.mark.parametrize(("queries", "q_offset"), [(256, 1024), (150, 777), (3, 40)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("epsilon", [0.3, 0.4])
def test_kept_mass_and_error_of_all_rows(
    queries: int, q_offset: int, group: int, epsilon: float
) -> None:
    tiles = Tiles(queries, q_offset, 128, 64)
    q = rand(2 * group, queries, 16)
    k = rand(2, tiles.keys, 16, seed=1)
    v = rand(2, tiles.keys, 16, seed=2)
    forced = forced_blocks(tiles, 1, [10_000] * tiles.count)
    problem = sparse_problem(
        q, (k, v), tiles, epsilon=torch.full((2,), epsilon), forced=forced, scale=SCALE
    )
    used = attend_on_cpu(problem)
    rows = torch.arange(queries)
    weights = torch.rand(queries, tiles.keys, generator=torch.Generator().manual_seed(4))
    verification = verify_rows(problem, used, SampledRows(rows, weights), ScratchBuffers())
    mass = oracle.kept_mass(q, k, tiles, used.keep, used.bias, problem.summaries, SCALE)
    torch.testing.assert_close(verification.kept_mass.view(-1, queries), mass, rtol=0, atol=1e-6)
    p = oracle.causal_scores(q, k, q_offset, SCALE).softmax(-1)
    weighted = (p.view(2, group, queries, -1) * weights).sum((1, 2))
    torch.testing.assert_close(verification.weighted, weighted)
    exact = oracle.dense(q, k, v, q_offset, SCALE)
    error = (used.out - exact).norm(dim=-1) / exact.norm(dim=-1)
    torch.testing.assert_close(
        verification.output_error.view(-1, queries), error, rtol=1e-6, atol=1e-6
    )
    if q_offset > 100:
        # The estimate it was selected by is honest on keys without structure.
        assert 1 - epsilon - 0.03 < mass.mean() < 1
    # The bound that makes the kept mass worth knowing.
    largest = v.norm(dim=-1).amax()
    assert ((used.out - exact).norm(dim=-1) <= 2 * (1 - mass) * largest + 1e-6).all()


def test_a_broken_value_is_held_against_the_rows_that_see_it() -> None:
    tiles = Tiles(128, 256, 128, 64)
    q = rand(4, 128, 16)
    k = rand(2, tiles.keys, 16, seed=1)
    v = rand(2, tiles.keys, 16, seed=2)
    v[1, 256 + 70, 3] = torch.nan
    forced = forced_blocks(tiles, 1, [10_000])
    problem = sparse_problem(
        q, (k, v), tiles, epsilon=torch.full((2,), 0.3), forced=forced, scale=SCALE
    )
    used = attend_on_cpu(problem)
    verified = verify_rows(problem, used, SampledRows(torch.arange(128)), ScratchBuffers())
    kept = verified.kept_mass.view(4, 128)
    assert (kept[:2] > 0).all()
    assert (kept[2:, :70] > 0).all()
    assert (kept[2:, 70:] == 0).all()


def test_rows_that_are_no_numbers_keep_nothing() -> None:
    # An LSE of -inf makes the mass of every key infinite, and its minimum with the truth perfect.
    tiles = Tiles(128, 256, 128, 64)
    q = rand(4, 128, 16)
    k = rand(2, tiles.keys, 16, seed=1)
    v = rand(2, tiles.keys, 16, seed=2)
    forced = forced_blocks(tiles, 1, [10_000])
    problem = sparse_problem(
        q, (k, v), tiles, epsilon=torch.full((2,), 0.3), forced=forced, scale=SCALE
    )
    used = attend_on_cpu(problem)
    used.lse[0, 5] = -torch.inf
    used.out[0, 5] = torch.nan
    used.lse[1, 6] = -torch.inf
    used.lse[2, 7] = torch.nan
    used.out[3, 8] = torch.inf
    rows = torch.arange(128)
    weights = torch.zeros(128, tiles.keys)
    verification = verify_rows(problem, used, SampledRows(rows, weights), ScratchBuffers())
    bad = torch.zeros(4, 128, dtype=torch.bool)
    bad[range(4), range(5, 9)] = True
    assert (verification.kept_mass.view(4, 128)[bad] == 0).all()
    assert (verification.output_error.view(4, 128)[bad] == 1).all()
    assert (verification.kept_mass.view(4, 128)[~bad] > 0.3).all()


def test_what_is_no_number_in_any_measurement_keeps_nothing() -> None:
    exact = rand(4, 8)
    out = exact.clone()
    lse = torch.zeros(4)
    kept = torch.ones(4)
    out[0, 3] = torch.inf
    lse[1] = -torch.inf
    kept[2] = torch.nan  # a summary that is none
    mass, error = measure_rows(kept, out, lse, exact)
    assert mass.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert error.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_sampled_rows_are_spread_and_differ() -> None:
    first = sample_rows(512, 4, 1)
    second = sample_rows(512, 4, 2)
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
    settings = SparseSettings(200)
    tiles = Tiles(512, 1024, 128, 64)
    rows, recheck = (set(found.tolist()) for found in choose_rows(settings, tiles, 0))
    assert len(rows) == 8
    assert len(recheck) == 24
    assert len(rows & recheck) < 4
    others, _ = choose_rows(settings, tiles, 1)  # of the next layer
    assert rows != set(others.tolist())


def test_long_prompts_verify_one_row_of_each_tile() -> None:
    rows, _ = choose_rows(SparseSettings(200), Tiles(512, 8192, 128, 64), 3)
    assert [int(row) // 128 for row in rows] == [0, 1, 2, 3]
