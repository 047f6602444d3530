"""Chaos in short: one service, disturbed for less than a minute, and every answer compared."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.chaos.__main__ import main
from benchmarks.chaos.findings import NEVER_RIGHT

FAULTS = (
    "rank-killed",
    "rank-paused",
    "decoders-killed",
    "client-killed",
    "disk-full",
    "connections-reset",
    "network-stalled",
    "clock-forward",
)


# With this seed a killed rank, killed decoders and a full disk come first.
def test_answers_stay_the_same_whatever_is_disturbed(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    options = ["--seconds", "40", "--films", "1", "--clients", "2", "--seed", "1295"]
    main([*options, "--faults", *FAULTS, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["mismatches"] == []
    assert sum(found["compared"].values()) > 3
    assert found["rows"][1:]  # the first one is without a fault
    assert all(row["recovered"] == row["times"] for row in found["rows"])
    assert not {failure["reason"] for failure in found["failures"]} & NEVER_RIGHT
    assert not any(found["leftovers"].values()), found["leftover_names"]
    assert found["faults_found"] == []
