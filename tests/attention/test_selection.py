"""Selection: what the estimate promises, which blocks are kept, and the lists made of them."""

from __future__ import annotations

import math

import pytest
import torch

from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.sparse.selection import (
    ROW_STEP,
    estimate,
    force_keep,
    forced_blocks,
    select,
    to_csr,
)
from prefill_service.attention.sparse.summaries import lift, misplaced_share, summarize
from prefill_service.attention.sparse.tiles import Tiles
from tests.attention.oracle import causal_scores, rand
from tests.attention.problems import (
    attend_on_cpu,
    lone_needles,
    sparse_problem,
    with_row_limit,
)

SCALE = 0.25


def none_forced(loss: torch.Tensor) -> torch.Tensor:
    return torch.zeros(loss.shape[1:], dtype=torch.bool)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 0.01, 1e-6])
def test_what_is_dropped_loses_at_most_epsilon(epsilon: float) -> None:
    loss = rand(3, 5, 200).abs() ** 4
    loss /= loss.sum(-1, keepdim=True)
    keep = select(loss, none_forced(loss), torch.full((3,), epsilon, dtype=loss.dtype))
    assert (loss.masked_fill(keep, 0).sum(-1) <= epsilon).all()
    # Kept are the largest, and a sixteenth of an octave less would have been too few.
    kept_least = loss.masked_fill(~keep, torch.inf).amin(-1)
    dropped_most = loss.masked_fill(keep, 0).amax(-1)
    assert (kept_least >= dropped_most).all()
    fewer = keep & (loss > kept_least[..., None] * 2 ** (1 / 16))
    # (The last level has no bound below: it holds everything under 2**-16 of the largest.)
    if epsilon > 1e-6:
        assert (loss.masked_fill(fewer, 0).sum(-1) > epsilon).all()


def test_each_head_has_its_own_epsilon() -> None:
    loss = torch.full((2, 1, 64), 1 / 64, dtype=torch.float64)
    keep = select(loss, none_forced(loss), torch.tensor([1.0, 0.5], dtype=loss.dtype))
    assert keep.sum(-1).tolist() == [[0], [64]]


def test_forced_and_unknown_blocks_are_kept() -> None:
    loss = torch.zeros(1, 2, 8)
    loss[0, 0, 3] = torch.nan
    loss[0, 1, 4] = torch.inf
    forced = torch.zeros(2, 8, dtype=torch.bool)
    forced[1, 7] = True
    keep = select(loss, forced, torch.ones(1))
    assert keep.nonzero().tolist() == [[0, 0, 3], [0, 1, 4], [0, 1, 7]]


def test_tiny_losses_below_the_last_level_are_kept_when_they_add_up() -> None:
    loss = torch.full((1, 1, 10_000), 2.0**-20)
    loss[..., 0] = 1
    assert select(loss, none_forced(loss), torch.tensor([1e-9])).all()
    assert select(loss, none_forced(loss), torch.tensor([0.1])).sum() == 1


@pytest.mark.parametrize("blocks", [0, 1])
def test_nothing_to_select(blocks: int) -> None:
    loss = torch.zeros(2, 3, blocks)
    keep = select(loss, none_forced(loss), torch.zeros(2))
    assert keep.shape == loss.shape
    assert not keep.any()
    csr = to_csr(torch.zeros(2, 3, blocks, dtype=torch.bool))
    assert csr.row_ptr.tolist() == [0] * 7
    assert csr.col.numel() == 0


def test_csr_lists_blocks_in_order() -> None:
    keep = rand(2, 3, 17) > 0
    csr = to_csr(keep)
    assert csr.row_ptr.dtype == csr.col.dtype == torch.int32
    for row in range(6):
        listed = csr.col[csr.row_ptr[row] : csr.row_ptr[row + 1]].tolist()
        assert listed == keep[row // 3, row % 3].nonzero()[:, 0].tolist()


def test_forced_blocks_are_candidates_only() -> None:
    tiles = Tiles(300, 1000, 128, 64)
    forced = forced_blocks(tiles, 2, [950, 1100, 1250])
    assert forced.shape == (3, tiles.blocks)
    assert [row.nonzero()[:, 0].tolist() for row in forced] == [[0, 1, 14], [0, 1], [0, 1]]
    assert forced_blocks(Tiles(10, 5, 128, 64), 2, [0]).shape == (1, 0)


def test_a_loss_of_one_row_keeps_its_block() -> None:
    loss = torch.full((2, 1, 4), 1e-3)
    peak = torch.tensor([[[0.3, 0.01, 0.06, 0.0]], [[0.3, 0.01, 0.06, 0.0]]])
    epsilon = torch.tensor([0.1, 0.5])
    keep = select(force_keep(loss, peak, epsilon / 2), none_forced(loss), epsilon)
    assert keep[:, 0].tolist() == [[True, False, True, False], [True, False, False, False]]


@pytest.mark.parametrize("shift", range(4))
def test_few_rows_that_look_for_one_thing_are_not_lost_in_their_tile(shift: int) -> None:
    """Nine neighbours of one query head of eight want nine keys far back; all else is diffuse."""
    group = 8
    queries = 128
    q_offset = 1024
    thing = slice(300, 309)
    q = rand(group, queries, 16)
    k = 0.3 * rand(1, q_offset + queries, 16, seed=1)
    v = rand(1, q_offset + queries, 16, seed=2)
    rows = slice(40 + shift, 49 + shift)
    k[:, thing] += 4 * q[0, 0] / q[0, 0].norm()
    q[0, rows] = 10 * q[0, 0] / q[0, 0].norm()
    tiles = Tiles(queries, q_offset, 128, 64)
    problem = sparse_problem(
        q,
        (k, v),
        tiles,
        epsilon=torch.tensor([0.2]),
        forced=torch.zeros(1, tiles.blocks, dtype=torch.bool),
        scale=SCALE,
        row_limit=torch.tensor([0.3]),
    )
    used = attend_on_cpu(problem)
    exact = torch.softmax(causal_scores(q, k, q_offset, SCALE), -1)
    assert exact[0, rows, thing].sum(-1).min() > 0.9
    assert exact[0, rows, thing].max() < 0.3  # all nine together are above the limit, not one
    assert used.keep[0, 0].nonzero()[:, 0].tolist() == [4]
    wanted = exact[0, rows] @ v[0].double()
    assert (used.out[0, rows] - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("quality", [Quality.HIGH, Quality.BALANCED, Quality.FAST])
@pytest.mark.parametrize("seed", range(4))
def test_what_one_row_alone_looks_for_is_kept(seed: int, quality: Quality) -> None:
    """Whichever row of the tile that is, from the row limit on."""
    limit = resolve_policy(quality).row_limit(0.2)
    tiles = Tiles(500, 2048 - 7, 128, 64)
    for mass in (1.1 * limit, 0.3, 0.9):
        problem, blocks = lone_needles(tiles, mass, seed)
        used = attend_on_cpu(with_row_limit(problem, limit))
        kept = torch.zeros_like(used.keep).scatter_(2, blocks[..., None], True)
        assert torch.equal(used.keep, kept)  # and nothing else
    problem, _ = lone_needles(tiles, 0.7 * limit, seed)
    assert not attend_on_cpu(with_row_limit(problem, limit)).keep.any()


@pytest.mark.parametrize(("queries", "q_offset"), [(256, 512), (200, 517), (1, 640), (130, 63)])
@pytest.mark.parametrize("group", [1, 4])
def test_estimate_against_the_formula_row_by_row(queries: int, q_offset: int, group: int) -> None:
    tiles = Tiles(queries, q_offset, 128, 64)
    q = rand(2 * group, queries, 16)
    k = rand(2, tiles.keys, 16, seed=1)
    v = rand(2, tiles.keys, 16, seed=2)
    known = summarize(k[:, : tiles.blocks * 64], v[:, : tiles.blocks * 64], 64)
    scores = causal_scores(q, k, q_offset, SCALE)
    local_lse = torch.zeros(2 * group, tiles.count * 128, dtype=torch.float64)
    for tile in range(tiles.count):
        rows = slice(tile * 128, min((tile + 1) * 128, queries))
        local_lse[:, rows] = scores[:, rows, tiles.local_start(tile) :].logsumexp(-1)
    packed_lse = tiles.pack(local_lse[..., None], 2)[..., 0]
    found = estimate(tiles.pack(q, 2), packed_lse, known, tiles=tiles, scale=SCALE)
    for head in range(2):
        for tile in range(tiles.count):
            seen = tiles.candidates(tile)
            rows = slice(tile * 128, min((tile + 1) * 128, queries))
            mine = (q[head * group : (head + 1) * group, rows] * SCALE).double()
            variance = (mine.square().mean((0, 1)) * known.k_var[head, :seen]).sum(-1)
            bias = lift(variance, 64) + math.log(64)
            logits = mine @ known.k_mean[head, :seen].mT + bias
            lse = local_lse[head * group : (head + 1) * group, rows]
            total = torch.logaddexp(logits.logsumexp(-1), lse) if seen else lse
            mass = torch.exp(logits - total[..., None])
            mass = mass * misplaced_share(variance)
            far = mine @ known.k_far[head, :seen].mT - total[..., None]
            far = torch.exp(far).clamp(max=1)
            asked = (mass + far)[:, ::ROW_STEP]
            torch.testing.assert_close(found.bias[head, tile, :seen], bias)
            torch.testing.assert_close(found.loss[head, tile, :seen], asked.mean((0, 1)))
            if seen:
                far = (far * known.far_count[head, :seen]).clamp(max=1)  # all outliers
                peak = torch.maximum(mass.amax((0, 1)), far.amax((0, 1)))
                torch.testing.assert_close(found.peak[head, tile, :seen], peak)
            assert (found.bias[head, tile, seen:] == -torch.inf).all()
            assert (found.loss[head, tile, seen:] == 0).all()
            assert (found.peak[head, tile, seen:] == 0).all()
