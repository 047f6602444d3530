"""A prefill's attention chunk by chunk: exact, sparse, clustered, reported."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prefill_service.attention.adaptive import AdaptiveAttention
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.attention.report import combine
from prefill_service.attention.settings import SparseSettings
from tests.attention import oracle
from tests.attention.layer import SCALE, error, layer_shape, run
from tests.attention.oracle import rand


@pytest.mark.parametrize("tokens", [1, 63, 64, 1000])
@pytest.mark.parametrize("group", [1, 7])
def test_a_vanishing_epsilon_is_dense(tokens: int, group: int) -> None:
    q = rand(2 * group, tokens, 16)
    k = rand(2, tokens, 16, seed=1)
    v = rand(2, tokens, 16, seed=2)
    got, report = run(q, k, v, resolve_policy(epsilon=1e-12))
    torch.testing.assert_close(got, oracle.dense(q, k, v, 0, SCALE), rtol=0, atol=1e-6)
    assert report.density == pytest.approx(1, abs=1e-9)
    assert report.layers[0].kept_mass.least > 1 - 1e-6
    assert report.layers[0].causal == tokens * (tokens + 1) / 2


def test_exact_never_goes_sparse_and_nothing_is_reordered() -> None:
    q = rand(4, 700, 16)
    k = rand(2, 700, 16, seed=1)
    v = rand(2, 700, 16, seed=2)
    got, report = run(q, k, v, resolve_policy(Quality.EXACT))
    torch.testing.assert_close(got, oracle.dense(q, k, v, 0, SCALE), rtol=0, atol=1e-6)
    assert report.density == 1
    assert report.layers[0].kept_mass.count == 0  # nothing was compared: there is nothing to be
    assert report.block_map is None
    assert len(report.patch_mass) == 14


def test_short_chunks_are_exact_until_sparsity_pays() -> None:
    q = rand(4, 1500, 16)
    k = rand(2, 1500, 16, seed=1)
    v = rand(2, 1500, 16, seed=2)
    got, report = run(q, k, v, resolve_policy(epsilon=0.4), from_tokens=1000)
    expected = oracle.dense(q, k, v, 0, SCALE)
    assert error(got[:, :900], expected[:, :900]) < 1e-6
    assert error(got[:, 900:], expected[:, 900:]) > 1e-3
    assert report.sparse_from_tokens == 1000


@pytest.mark.parametrize(
    ("chunk", "block"), [(128, 64), (300, 64), (3000, 64), (128, 128), (300, 128)]
)
def test_structured_keys_are_sparse_and_close(chunk: int, block: int) -> None:
    # Four kinds of key in raster order; queries of a moment want the kind of their moment.
    kinds = rand(4, 32, seed=1) * 0.8
    k = kinds.repeat(750, 1)[None] + 0.1 * rand(2, 3000, 32, seed=2)
    v = rand(4, 32, seed=3).repeat(750, 1)[None] + 0.1 * rand(2, 3000, 32, seed=4)
    q = kinds[torch.arange(3000) // 750].expand(8, -1, -1) + 0.1 * rand(8, 3000, 32, seed=5)
    got, report = run(q, k, v, resolve_policy(epsilon=0.05), chunk, block=block)
    layer = report.layers[0]
    assert error(got, oracle.dense(q, k, v, 0, SCALE)) < 0.05
    assert layer.kept_mass.mean(0) > 0.93
    if chunk == 3000:  # without a past to cluster most keys are needed, and dense is cheaper
        assert layer.density == 1
        assert report.block_map is None
    else:
        assert layer.density < (0.6 if block == 64 else 0.7)  # larger blocks keep more for as much
        assert report.block_map is not None
    assert layer.tiles == 2 * sum(
        -(-min(chunk, 3000 - start) // 128) for start in range(0, 3000, chunk)
    )


@pytest.mark.parametrize("patch", [50, 300, 700])
def test_sinks_and_the_previous_patch_are_attended_whole(patch: int) -> None:
    # They are kept as blocks of the buffer, so that their keys must not be moved elsewhere.
    tokens = 4200
    chunk = patch * (300 // patch or 1)
    ends = np.append(np.arange(patch, tokens, patch), tokens)
    k = rand(2, tokens, 16, seed=1)
    v = rand(2, tokens, 16, seed=2)
    q = rand(2, tokens, 16)
    policy = resolve_policy(epsilon=0.999, min_kept_mass=0)
    attention = AdaptiveAttention(SparseSettings(1), policy, layer_shape(q, k), ends)
    kv = torch.stack([k.transpose(0, 1), v.transpose(0, 1)], 1).contiguous()
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        attention.attend_unit(0, q[:, part], kv, start=start)
        for name, token in (("sink", 0), ("sink", 63), ("previous", max(0, start - patch))):
            assert torch.equal(kv[token, 0], k[:, token]), (name, token, start)
    reordered = (kv[:, 0] != k.transpose(0, 1)).any(-1)  # [tokens, kv_heads]
    assert not reordered[:64].any()
    assert reordered[64:1024].double().mean() > 0.9
    last = (tokens - 1) // chunk * chunk
    assert not reordered[max(0, last - patch) :].any()


def test_patch_mass_shows_where_the_attention_goes() -> None:
    q = 0.1 * rand(4, 2000, 16)
    k = 0.1 * rand(2, 2000, 16, seed=1)
    v = rand(2, 2000, 16, seed=2)
    k[:, 600:650, 0] += 4
    q[..., 0] += 4
    for policy in (resolve_policy(Quality.EXACT), resolve_policy(epsilon=0.2)):
        _, report = run(q, k, v, policy)
        mass = np.array(report.patch_mass)
        assert mass.argmax() == 12
        assert mass[12] > 10 * np.median(mass)


def test_ranks_combine_to_what_one_rank_reports() -> None:
    q = rand(4, 1024, 16)
    k = rand(2, 1024, 16, seed=1)
    v = rand(2, 1024, 16, seed=2)
    kv = torch.stack([k.transpose(0, 1), v.transpose(0, 1)], 1).contiguous()
    ends = np.arange(64, 1025, 64)
    parts = []
    for rank in range(2):
        attention = AdaptiveAttention(
            SparseSettings(1), resolve_policy(epsilon=0.3), layer_shape(q, k), ends
        )
        for start in range(0, 1024, 512):
            mine = start + 256 * rank
            attention.attend_unit(0, q[:, mine : mine + 256], kv, start=mine)
        parts.append(attention.stats.report())
    report = combine(parts)
    layer = report.layers[0]
    assert layer.causal == 1024 * 1025 / 2
    assert layer.tiles == 16
    assert layer.kept_mass.count == 4 * 4 * 4  # chunks x ranks: runs x samples x heads
    assert 0 < report.density < 1
    assert report.block_map is not None
    grid = np.array(report.block_map.density).reshape(report.block_map.rows, -1)
    assert (grid <= 1).all()
    assert (grid[np.triu_indices(len(grid), 4)] == -1).all()
