"""A slice of the scaling report: bytes on real ranks, the fit, and projections by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.parallel import scaling
from benchmarks.parallel.projection import (
    NETWORK,
    NVLINK,
    Assumptions,
    project,
    spava_pairs,
    spava_projection,
)
from benchmarks.parallel.work import Measured
from prefill_service.cost_model.cost import ASSUMED
from prefill_service.cost_model.presets import PRESETS
from prefill_service.parallel.exchanges.catalog import RING

SHAPE = PRESETS["qwen2.5-vl-7b"]


def test_a_small_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.json"
    arguments = ["--ranks", "2", "--checked-tokens", "288", "576", "--output", str(output)]
    assert scaling.main(arguments) == 0
    printed = capsys.readouterr().out
    for sentence in Assumptions().sentences():
        assert sentence in printed
    found = json.loads(output.read_text())
    assert [row["ranks"] for row in found["checked"]] == [1] * 2 + [2] * 14
    assert all(row["bytes"] == row["formula"] for row in found["checked"])
    assert all(sum(row["bytes"]) > 0 for row in found["checked"][2:])
    assert all(row["cpu_s"] > 0 for row in found["checked"])
    contestants = {row["contestant"] for row in found["projected_not_measured"]}
    assert {"dense, 1 GPU", "zigzag ring", "one-chunk ulysses", "Spava"} < contestants
    assert {"ours: gather, sparse", "ours: demand, sparse", "ours: usp 8x4"} < contestants
    assert {"ours: ulysses_gather 4x2, sparse", "ours: ulysses_gather 4x8, sparse"} < contestants
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_other_bytes_than_the_formulas_are_seen() -> None:
    one = Measured(
        kind=RING, ranks=2, tokens=576, chunk=256, received=(1, 2), cpu_seconds=(0.1, 0.1)
    )
    right = replace(one, received=one.predicted_bytes())
    rows = [scaling.check(run, ASSUMED) for run in (one, right)]
    assert [row["bytes"] == row["formula"] for row in rows] == [False, True]


def test_spava_by_the_published_lengths() -> None:
    """Attended pairs block by block; at 8 ranks about a fifth of the causal ones."""
    tokens = 1 << 20
    ranks = 8
    anchor = tokens // 64
    passing = tokens // 128
    block = tokens // 16
    pairs = sum(block * (i * passing + anchor) + block**2 / 2 for i in range(2 * ranks))
    pairs += ranks * anchor**2 / 2  # every rank computes the anchor
    found = ranks * spava_pairs(tokens, ranks, anchor, passing)
    assert found == pytest.approx(pairs)
    assert 0.2 < found / (tokens**2 / 2) < 0.22
    projected = spava_projection(SHAPE, 131_072, NVLINK, Assumptions())
    assert projected.received == 27 * 28 * 2**20  # 28 MiB per layer at 8 ranks


def test_projections_add_up() -> None:
    given = Assumptions(overhead=0.0)
    tokens = 1 << 20
    found = {one.name: one for one in project(SHAPE, tokens, NVLINK, given)}
    flops = tokens * SHAPE.linear_flops / given.linear
    flops += tokens * (tokens + 1) / 2 * SHAPE.attention_flops(28) / given.attention
    assert found["dense, 1 GPU"].seconds == pytest.approx(flops / given.peak, rel=1e-6)
    ring = found["zigzag ring"]
    assert ring.seconds == pytest.approx(flops / given.peak / 8, rel=1e-6)  # all hidden
    assert ring.received == 27 * SHAPE.row_bytes * tokens * 7 // 8
    sparse = found["ours: gather, sparse"]
    assert sparse.seconds < 0.3 * found["ours: gather"].seconds
    assert found["ours: demand, sparse"].received < 0.6 * sparse.received


def test_slow_links_show_where_they_are_not_hidden() -> None:
    slow = replace(NETWORK, network=1e9)
    for name in ("zigzag ring", "Spava", "ours: gather, sparse", "ours: demand, sparse"):
        seconds = [
            next(one for one in project(SHAPE, 131_072, machine, Assumptions()) if one.name == name)
            for machine in (NETWORK, slow)
        ]
        assert seconds[1].seconds > seconds[0].seconds
        assert seconds[1].exposed > seconds[0].exposed
