"""Sparse attention in real rank processes: KV against the exact one, the report, the probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import NEVER
from prefill_service.engine.task_state import PrefillOutcome
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.parallel.exchanges.catalog import DEMAND, EXCHANGES, GATHER, ExchangeKind
from prefill_service.parallel.exchanges.registry import choose_exchange
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

VIDEO = {"seconds": 20.0, "fps": 10, "width": 160, "height": 120}


async def prefill(
    standalone: StandaloneExecutor,
    video: Path,
    policy: AttentionPolicy,
    exchange: ExchangeKind = GATHER,
) -> tuple[torch.Tensor, PrefillOutcome]:
    plan, _ = await standalone.plan(video, FrameSampling(fps=8.0))
    plan = replace(plan, prefix_id=f"pfx_{policy.attention_key}_{exchange}")
    shape = standalone.planner.checkpoint.shape
    ranks = standalone.executor.all_ranks.size
    choice = choose_exchange(exchange, ranks, q_heads=shape.q_heads, kv_heads=shape.kv_heads)
    task = standalone.task(video, plan, choice, policy=policy)
    outcome = await standalone.prefill(task)
    return standalone.read_kv(task), outcome


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


async def test_any_number_of_ranks_selects_the_same(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    video = make_video(**VIDEO)
    policy = resolve_policy(epsilon=0.6)
    model = checkpoint("qwen3_vl")
    found = {}
    for ranks in (1, 2, 3, 4):
        folder = tmp_path / f"{ranks}"
        async with standalone_executor(
            model, folder, ranks, chunk_tokens=540, sparse_from_tokens=400
        ) as standalone:
            for exchange in filter(lambda kind: kind.sparse, EXCHANGES):
                found[ranks, exchange] = await prefill(standalone, video, policy, exchange)
    expected, alone = found[1, GATHER]
    assert alone.attention.density < 1
    for (ranks, exchange), (kv, outcome) in found.items():
        assert error(kv, expected) < 1e-5
        for ours, theirs in zip(outcome.attention.layers, alone.attention.layers, strict=True):
            # Counted in key columns per head: one block more or less anywhere would show.
            assert ours.attended == theirs.attended, (ranks, exchange)
            assert ours.tiles_redone == theirs.tiles_redone
            assert ours.kept_mass.count == theirs.kept_mass.count
            assert ours.head_mass == pytest.approx(theirs.head_mass, rel=1e-3)
        if exchange != DEMAND:  # which does not know where clustered keys are from
            assert outcome.attention.block_map == alone.attention.block_map
            mass = outcome.attention.patch_mass
            assert mass == pytest.approx(alone.attention.patch_mass, rel=1e-3)


@pytest.mark.parametrize("ranks", [2])
async def test_kv_follows_epsilon(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path, ranks: int
) -> None:
    video = make_video(**VIDEO)
    model = checkpoint("qwen3_vl")
    async with standalone_executor(
        model, tmp_path, ranks, chunk_tokens=200, sparse_from_tokens=400
    ) as standalone:
        exact, outcome = await prefill(standalone, video, resolve_policy(Quality.EXACT))
        report = outcome.attention
        assert report.density == 1
        assert report.block_map is None
        layers = standalone.executor.kv_layout.num_layers - 1
        assert [layer.layer for layer in report.layers] == list(range(layers))
        # Exact attention is timed too; waiting for other ranks is no part of it.
        attended = sum(layer.attend_s for layer in report.layers)
        assert 0 < attended < outcome.stage_seconds["prefill"]

        close, _ = await prefill(standalone, video, resolve_policy(epsilon=1e-9))
        assert error(close, exact) < 1e-5
        errors = []
        for epsilon in (0.6, 0.75):
            got, outcome = await prefill(standalone, video, resolve_policy(epsilon=epsilon))
            errors.append(error(got, exact))
            report = outcome.attention
            assert report.sparse_from_tokens == 400
            assert 0 < report.density < 1
            tokens = got.shape[2]
            for layer in report.layers:
                assert layer.causal == tokens * (tokens + 1) / 2
                assert layer.kept_mass.count > 0
                assert layer.kept_mass.mean(0) >= 1 - 2 * epsilon  # the floor; epsilon is estimated
                assert layer.select_s > 0
                assert layer.attend_s > 0
            assert len(report.patch_mass) == 80  # 160 frames, two per temporal patch
            assert np.isfinite(report.patch_mass).all()
            assert report.block_map is not None
            assert report.imbalance == 1 if ranks == 1 else 1 < report.imbalance < 1.5
            # Fetching only what was selected changes nothing but what travels.
            same, demand = await prefill(standalone, video, resolve_policy(epsilon=epsilon), DEMAND)
            assert error(same, got) < 1e-5
            assert demand.attention.density == pytest.approx(report.density, abs=2e-3)
            for layer, other in zip(report.layers, demand.attention.layers, strict=True):
                assert other.kept_mass.count == layer.kept_mass.count
                assert other.kept_mass.mean(0) == pytest.approx(layer.kept_mass.mean(0), abs=1e-3)
            if ranks > 1:
                assert demand.communication["blocks"].bytes_received > 0
        assert 1e-6 < errors[0] < errors[1]

        # Layer 0's keys are computed before any attention; the rest has been approximated.
        assert torch.equal(got[0], exact[0])
        same, _ = await prefill(standalone, video, resolve_policy(Quality.EXACT), DEMAND)
        assert error(same, exact) < 1e-6
        again, _ = await prefill(
            standalone, video, resolve_policy(Quality.EXACT, min_kept_mass=0.5)
        )
        assert torch.equal(again, exact)  # bit for bit, after sparse ones in the same process


async def test_the_crossover_is_measured_at_start(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path], tmp_path: Path
) -> None:
    video = make_video(seconds=1.0, fps=5, width=130, height=98)
    async with standalone_executor(
        checkpoint("qwen3_vl"), tmp_path, 2, sparse_from_tokens=0
    ) as standalone:
        exact, _ = await prefill(standalone, video, resolve_policy(Quality.EXACT))
        got, outcome = await prefill(standalone, video, resolve_policy(Quality.FAST))
    # No machine gains from sparsity at a few hundred tokens: the exact path ran.
    assert 1024 <= outcome.attention.sparse_from_tokens <= NEVER
    assert outcome.attention.density == 1
    assert torch.equal(got, exact)
