"""The CPU benchmark runs; what it times is the product and gives everybody the same mask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.attention import cpu as attention_cpu
from benchmarks.attention import problem as cpu_problem
from benchmarks.attention.flex import Flex

KEYS = {"tokens", "density", "threads", "dense_s", "ours_s", "select_s", "flex_s"}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark sets them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "attention-cpu.json"
    attention_cpu.main(
        [
            *("--tokens", "2048", "--densities", "0.3", "1", "--threads", "1", "--rounds", "1"),
            *("--no-flex", "--out", str(out)),
        ]
    )
    rows = json.loads(out.read_text())
    assert [row["wanted_density"] for row in rows] == [0.3, 1.0]
    # The closest there is: a tile keeps single-row blocks all at once, a head turns dense.
    assert rows[0]["density"] == pytest.approx(0.3, abs=0.05)
    assert rows[1]["density"] == 1.0
    for row in rows:
        assert row.keys() >= KEYS
        assert row["flex_s"] is None
        assert row["ratio_attend"] == pytest.approx(
            row["dense_s"] / row["ours_s"] * row["density"], rel=0.01, abs=0.001
        )
    printed = capsys.readouterr().out
    assert "correct: relative error against float64" in printed
    assert "flex_s = null: --no-flex" in printed
    assert json.loads(out.with_suffix(".meta.json").read_text())["torch"] == torch.__version__


def test_densities_below_the_floor_collapse_into_one() -> None:
    estimates = cpu_problem.estimate_losses(cpu_problem.make(2048, 8, 2, head_dim=64, chunk=512))
    found = attention_cpu.reachable(estimates, (0.01, 0.02, 0.3, 1.0))
    assert list(found) == [0.02, 0.3, 1.0]
    assert estimates.density(found[0.02]) > 0.02
    assert estimates.density(found[0.3]) == pytest.approx(0.3, abs=0.05)
    assert estimates.density(found[1.0]) == 1.0


def test_flex_attends_to_the_blocks_that_are_kept() -> None:
    """Its mask in dense form, uncompiled, against the blocks that the estimates keep."""
    problem = cpu_problem.make(1536, 8, 2, head_dim=64, chunk=256)
    estimates = cpu_problem.estimate_losses(problem)
    epsilon = estimates.epsilon(0.4)
    mask = Flex(problem, estimates).mask(epsilon)
    block = cpu_problem.SETTINGS.block_tokens
    kept = torch.cat(
        [
            torch.nn.functional.pad(keep, (0, 1536 // block - keep.shape[-1]))
            for keep in (chunk.keep(epsilon) for chunk in estimates.chunks)
        ],
        1,
    )
    full = torch.zeros(1, 8, 12, 2 * 1536 // block, dtype=torch.bool)
    for head in range(8):
        for tile in range(12):
            count = mask.full_kv_num_blocks[0, head, tile]
            full[0, head, tile, mask.full_kv_indices[0, head, tile, :count].long()] = True
    clustered, raster = full[0].unflatten(-1, (2, -1)).unbind(2)
    assert not (clustered & raster).any()
    assert torch.equal((clustered | raster)[::4], kept)
    assert clustered.any()
    assert raster.any()
    for (
        chunk
    ) in estimates.chunks:  # clustered keys only where no query of the chunk or a later one is
        rows = slice(
            chunk.tiles.q_offset // 128, (chunk.tiles.q_offset + chunk.tiles.queries) // 128
        )
        assert not clustered[:, rows, chunk.clustered // block :].any()
        assert not raster[:, rows, : chunk.clustered // block].any()
