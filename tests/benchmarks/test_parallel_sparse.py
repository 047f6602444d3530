"""A slice of the benchmark of sparse exchanges: real ranks, every exchange the same prefix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.parallel import sparse


def test_a_small_report(tmp_path: Path) -> None:
    out = tmp_path / "sparse.json"
    small = ["--ranks", "2", "--tokens", "2600", "--quality", "exact", "fast"]
    assert sparse.main([*small, "--out", str(out)]) == 0
    rows = {(row["quality"], row["exchange"]): row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == 2 * len(sparse.KINDS)
    for (quality, exchange), row in rows.items():
        assert (row["density"] == 1) == (quality == "exact"), (quality, exchange)
        assert row["mb"] > 0
        assert row["mb"] == pytest.approx(sum(row["by_collective_mb"].values()), abs=0.03)
