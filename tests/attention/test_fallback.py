"""The floor: who misses it, what is computed again, and what comes of inputs beyond reason."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from prefill_service.attention.fallback import below_floor
from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import AttentionReport
from prefill_service.attention.sparse import cpu_backend
from prefill_service.attention.sparse.selection import ROW_STEP
from prefill_service.scheduling.attention_summary import summarize
from tests.attention import oracle
from tests.attention.layer import SCALE, error, run
from tests.attention.oracle import rand


def hidden_needles() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two keys of one block that every other query wants, the rest its opposite.

    Every block has keys farther from its mean, in directions of their own that no query has: they
    are its outliers, and two keys of 64 hardly show in the variance.
    """
    wish = torch.zeros(32, dtype=torch.float64)
    wish[3] = 1
    k = 0.05 * rand(1, 2048, 32, seed=1)
    v = rand(1, 2048, 32, seed=2)
    k[0, [333, 334]] += 6 * wish
    v[0, [333, 334]] += 5
    decoys = torch.arange(0, 2048, 8)
    k[0, decoys, 8 + decoys // 8 % 24] += 20
    q = 0.05 * rand(2, 2048, 32, seed=3)
    q[:, 1::2] += 6 * wish / SCALE * 1.2 / 4
    q[:, 0::2] -= 6 * wish / SCALE * 1.2 / 4
    return q, k, v


def map_density(report: AttentionReport) -> float:
    """Mean over the cells of the block map."""
    assert report.block_map is not None
    return float(np.mean([cell for cell in report.block_map.density if cell >= 0]))


def test_needles_that_the_estimate_misses_trigger_the_floor() -> None:
    q, k, v = hidden_needles()
    expected = oracle.dense(q, k, v, 0, SCALE)
    blind, without = run(q, k, v, resolve_policy(epsilon=0.3, min_kept_mass=0))
    missed = without.layers[0]
    assert missed.tiles_redone == missed.tiles_dense == 0
    assert missed.kept_mass.least < 0.5  # verification sees what the estimate did not
    assert error(blind, expected) > 0.3

    seen, report = run(q, k, v, resolve_policy(epsilon=0.3, min_kept_mass=0.9))
    layer = report.layers[0]
    assert 0 < layer.tiles_redone <= layer.tiles
    assert layer.kept_mass.mean(0) >= 0.9
    assert error(seen, expected) < 0.5 * error(blind, expected)
    assert layer.density > missed.density
    assert map_density(report) > map_density(without)  # maps show what was used


def test_what_a_smaller_epsilon_cannot_mend_is_computed_densely() -> None:
    q, k, v = hidden_needles()
    got, report = run(q, k, v, resolve_policy(epsilon=0.9, min_kept_mass=1.0))
    layer = report.layers[0]
    assert layer.tiles_dense > 0.8 * layer.tiles  # in the first tiles nothing can be lost
    assert report.density > 0.99
    assert error(got, oracle.dense(q, k, v, 0, SCALE)) < 1e-3


def test_only_the_heads_below_the_floor_are_computed_again() -> None:
    q, k, v = hidden_needles()
    plain = 0.05 * rand(1, 2048, 32, seed=8)
    q = torch.cat([0.05 * rand(2, 2048, 32, seed=9), q])
    k, v = torch.cat([plain, k]), torch.cat([rand(1, 2048, 32, seed=10), v])
    policy = resolve_policy(epsilon=0.3, min_kept_mass=0.9)
    got, report = run(q, k, v, policy)
    redone = report.layers[0].tiles_redone
    assert 0 < redone <= report.layers[0].tiles / 2  # one of two heads; a second retry is none more
    alone, _ = run(q[:2], k[:1], v[:1], policy)
    torch.testing.assert_close(got[:2], alone, rtol=0, atol=1e-9)


def one_head_of_four(seeking: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden needles that one of four query heads wants with all rows but those of the mean."""
    _, k, v = hidden_needles()
    wish = torch.zeros(2048, 32, dtype=torch.float64)
    wish[seeking, 3] = 6.0
    wish[::ROW_STEP] = 0
    q = 0.05 * rand(4, 2048, 32, seed=3)
    q[1] += wish
    return q, k, v


@pytest.mark.parametrize("quality", [Quality.BALANCED, Quality.FAST])
def test_the_floor_is_held_by_every_query_head(quality: Quality) -> None:
    q, k, v = one_head_of_four(slice(0, 2048))
    expected = oracle.dense(q, k, v, 0, SCALE)
    rows = [row for row in range(1024, 2048) if row % ROW_STEP]  # those that seek the needles
    policy = resolve_policy(quality)
    blind, without = run(q, k, v, AttentionPolicy(quality, policy.epsilon, 0.0), 512)
    assert error(blind[1, rows], expected[1, rows]) > 0.9
    assert without.layers[0].kept_mass.mean(0) > 0.75  # the group's mean would have met the floor

    seen, report = run(q, k, v, policy, 512)
    assert report.layers[0].tiles_redone > 0
    assert error(seen[1, rows], expected[1, rows]) < 0.01


def test_a_stretch_without_its_needles_is_enough() -> None:
    # Four of the sixteen tiles: the head's mean over the chunk is well above the floor.
    q, k, v = one_head_of_four(slice(1280, 1792))
    expected = oracle.dense(q, k, v, 0, SCALE)
    rows = [row for row in range(1280, 1792) if row % ROW_STEP]
    got, report = run(q, k, v, resolve_policy(Quality.BALANCED), 2048)
    assert report.layers[0].tiles_redone == 16
    assert error(got[1, rows], expected[1, rows]) < 0.01


def test_time_of_what_is_computed_again_is_not_that_of_verification(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept_attention = cpu_backend.kept_attention
    calls = []

    def slowly(*args: Any) -> Any:
        time.sleep(0.15)
        calls.append(1)
        return kept_attention(*args)

    monkeypatch.setattr(cpu_backend, "kept_attention", slowly)
    q, k, v = hidden_needles()
    _, report = run(q, k, v, resolve_policy(epsilon=0.3, min_kept_mass=0.9), 512)
    layer = report.layers[0]
    assert len(calls) > 3  # a chunk that needs no second try would have needed one call
    assert layer.attend_s > 0.15 * len(calls)
    assert 0 < layer.verify_s < 0.15 * (len(calls) - 3)


def test_scores_far_below_their_estimate_are_attended_to() -> None:
    # The sink block's keys score 80 or -80; of such a variance the estimate makes far more. It
    # would leave nothing of all true scores in float32.
    q = 0.05 * rand(4, 1024, 16, dtype=torch.float32)
    v = rand(1, 1024, 16, dtype=torch.float32)
    k = 0.05 * rand(1, 1024, 16, seed=1, dtype=torch.float32)
    for height in (80.0, 150.0):
        k[0, :64:2, 0] = height
        k[0, 1:64:2, 0] = -height
        q[:, 640:768, 0] = 1 / SCALE
        got, report = run(q, k, v, resolve_policy(Quality.BALANCED), 128)
        assert got.isfinite().all()
        assert error(got[:, 640:768], oracle.dense(q, k, v, 0, SCALE)[:, 640:768]) < 1e-3
        assert report.layers[0].kept_mass.least > 0.5


def test_what_is_not_a_number_misses_the_floor() -> None:
    q = rand(4, 700, 16)
    k = rand(2, 700, 16, seed=1)
    v = rand(2, 700, 16, seed=2)
    v[1, 3] = torch.nan  # every later query of these heads sees it
    policy = resolve_policy(Quality.BALANCED)
    got, report = run(q, k, v, policy, 350)
    layer = report.layers[0]
    assert got[2:, 3:].isnan().all()
    assert got[:2].isfinite().all()
    assert layer.tiles_dense == layer.tiles / 2
    assert layer.kept_mass.mean(1) < 0.6
    assert layer.kept_mass.least == 0
    assert layer.output_error.percentile(1, 0) == 0.999  # of bins up to 1
    assert not summarize(policy, report).floor_met


def test_rounding_misses_no_floor() -> None:
    # All of it is attended densely, so that verification sees nothing but float32's rounding.
    q, k, v = (rand(2, 1024, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    policy = resolve_policy(epsilon=1e-9, min_kept_mass=1.0)
    _, report = run(q, k, v, policy, 512)
    layer = report.layers[0]
    assert layer.kept_mass.mean(0) < 1
    assert layer.tiles_redone == layer.tiles_dense == 0
    assert summarize(policy, report).floor_met


def test_one_query_head_below_the_floor_is_enough() -> None:
    mass = torch.full((3, 4, 20), 0.9)
    mass[1, 2] = 0.65
    assert below_floor(mass, 0.7).tolist() == [False, True, False]
    mass[1, 2] = 0.7 - 1e-7  # rounding
    assert not below_floor(mass, 0.7).any()
    mass[2, 0, 7:11] = 0.3  # four neighbours far below; the head's mean is 0.78
    assert below_floor(mass, 0.7).tolist() == [False, False, True]
    mass[2, 0, 9] = 0.9  # three rows by chance
    assert not below_floor(mass, 0.7).any()
    assert below_floor(mass[:, :, :2] - 0.4, 0.7).all()  # fewer rows than a stretch
    assert not below_floor(torch.zeros(2, 1, 6), 0.0).any()  # switched off
