"""The selection benchmark runs, and measures what it says."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks import inputs
from benchmarks.quality import selection
from benchmarks.quality.estimators import (
    ESTIMATORS,
    ORACLE,
    ORDERS,
    OURS,
    Estimate,
    cut,
    segment_order,
)
from benchmarks.quality.evaluation import Sample
from benchmarks.quality.rules import RULES, stack


def test_inputs_have_the_structure_they_are_named_after() -> None:
    """How much of the attention the best 5 % of the keys hold, and where the largest one is."""
    held = {}
    for kind in inputs.KINDS:
        made = inputs.synthetic(kind, 2048, seed=3)
        again = inputs.synthetic(kind, 2048, seed=3)
        assert torch.equal(made.q, again.q)
        assert torch.equal(made.v, again.v)
        p = (made.q[:4, -200:] * made.scale @ made.k[0, :1848].T).softmax(-1)
        held[kind] = float(p.topk(92, -1).values.sum(-1).mean())
        if kind == "grid":
            best = made.place[p.argmax(-1)]
            assert (best == made.place[-200:]).float().mean() > 0.5
    assert held["diffuse"] == min(held.values())
    assert held["columns"] > 0.6
    assert held["needles"] > held["diffuse"] + 0.05


def test_captured_tensors_keep_their_places(tmp_path: Path) -> None:
    """Timestamps between patches, or a single run of patches of a known size."""
    tensors = (torch.zeros(2, 12, 4), torch.zeros(1, 12, 4), torch.zeros(1, 12, 4), 0.5)
    for extra, ids, places in (
        ({}, [9, 5, 5, 5, 9, 9, 5, 5, 5, 9, 5, 5], [-1, 0, 1, 2, -1, -1, 0, 1, 2, -1, 0, 1]),
        ({"patch_tokens": 4}, [9] + [5] * 11, [-1, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]),
    ):
        inputs.save(tmp_path / "kv.pt", {"cap": {0: tensors}, "ids": torch.tensor([ids]), **extra})
        (layer,) = inputs.load(tmp_path / "kv.pt")
        assert layer.place.tolist() == places


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_permutations(order: str) -> None:
    source = inputs.synthetic("drift", 512, seed=1)
    found = segment_order(source.k[0], source.place, order, 64)
    assert sorted(found.tolist()) == list(range(512))


def test_sample_agrees_with_attention_written_out() -> None:
    """Kept mass and error of both ways to treat dropped blocks, in float64, the long way."""
    source = inputs.synthetic("mixture", 640, seed=2)
    source = inputs.AttentionInput(
        name=source.name,
        q=source.q.double(),
        k=source.k.double(),
        v=source.v.double(),
        scale=0.125,
        place=source.place,
    )
    tile = cut(
        source, 1, 480, tile=64, block=32, order=torch.randperm(448)
    )  # 15 candidates, a local region of 64
    keep = torch.rand(3, 15, generator=torch.Generator().manual_seed(0)) < 0.4
    sample = Sample(tile, rows=10**6)
    q = tile.q.flatten(0, 1)
    local = (q @ tile.local_k.T).masked_fill(~tile.visible.repeat(4, 1), -torch.inf)
    exact = torch.cat([q @ tile.k.flatten(0, 1).T, local], 1).softmax(-1)
    values = torch.cat([tile.v.flatten(0, 1), tile.local_v])
    for variant, kept in enumerate(keep):
        tokens = torch.cat([kept.repeat_interleave(32), torch.ones(64, dtype=torch.bool)])
        scores = torch.cat([q @ tile.k.flatten(0, 1).T, local], 1)
        scores = scores.masked_fill(~tokens, -torch.inf)
        summary = tile.summary_logits(q).masked_fill(kept, -torch.inf)
        for quality, extra in (
            (sample.drop(keep), torch.full_like(summary, -torch.inf)),
            (sample.compensate(keep), summary),
        ):
            used = torch.cat([scores, extra], 1).softmax(-1)
            out = used @ torch.cat([values, tile.v.mean(1)])
            error = (out - exact @ values).norm() / (exact @ values).norm()
            spread = used[:, :-15].clone()
            spread[:, : 15 * 32] += (used[:, -15:] / 32).repeat_interleave(32, 1)
            overlap = torch.minimum(exact, spread).sum(1)
            torch.testing.assert_close(quality.error[variant], error)
            torch.testing.assert_close(quality.kept[:, variant], overlap)
            torch.testing.assert_close(quality.plain[:, variant], exact[:, tokens].sum(1))


def test_rules_reach_the_wanted_density_with_the_best_blocks() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=rng) ** 4 / n for n in (40, 64, 100)]
    tiles = stack([Estimate(score, score) for score in scores], sinks=1)
    for name, rule in RULES.items():
        _, keep = rule.match(tiles, 0.25)
        assert not (keep & ~tiles.present).any()
        assert keep[:, 0].all(), "sinks"
        assert 0.25 <= keep.sum() / tiles.present.sum() < 0.32, name
        for index, score in enumerate(scores):
            kept = keep[index, 1 : len(score)]
            assert score[1:][kept].min() >= score[1:][~kept].max(), name


def test_benchmark_runs_and_the_oracle_wins(tmp_path: Path) -> None:
    out = tmp_path / "selection.json"
    selection.main(
        [
            *("--tokens", "1024", "--kinds", "mixture", "--segment", "256"),
            *("--tiles-per-head", "1", "--rows-per-tile", "512", "--out", str(out)),
        ]
    )
    result = json.loads(out.read_text())
    assert result["settings"]["tokens"] == 1024
    rows = [row for row in result["rows"] if row["input"] == "all"]
    assert {(row["estimator"], row["order"]) for row in rows} == set(product(ESTIMATORS, ORDERS))
    assert {row["rule"] for row in rows if row["estimator"] == OURS} == set(RULES)
    for order in ORDERS:
        mass = {
            row["estimator"]: row["block_mass"]
            for row in rows
            if row["order"] == order
            and row["rule"] == "fixed budget"
            and not row["summaries"]
            and row["wanted_density"] == 0.2
        }
        assert mass[ORACLE] == max(mass.values())
    # What an oracle estimates of the mass it keeps is the truth.
    oracle = [row for row in rows if row["estimator"] == ORACLE and not row["summaries"]]
    for row in oracle:
        assert row["estimated_kept_mass"] == pytest.approx(row["kept_mass"], abs=2e-4)
