"""A slice of the balance benchmark: real ranks, and that a skew is evened out."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.parallel import balance


def test_a_small_report(tmp_path: Path) -> None:
    out = tmp_path / "balance.json"
    assert balance.main(["--tokens", "6144", "--rounds", "1", "--out", str(out)]) == 0
    rows = {row["busy"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(balance.BUSY)
    skewed = rows["every second unit"]
    assert skewed["rho"] < skewed["rho_before"]
    assert 0 < skewed["density"] < rows["every unit"]["density"] <= 1
    assert all(row["seconds"] > 0 and row["seconds_balanced"] > 0 for row in rows.values())
