"""The parts of a profiled prefill add up, and each is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.attention import profile_prefill


def test_parts_add_up(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    profile_prefill.main(
        [
            "--checkpoint",
            str(checkpoint("qwen3_vl")),
            "--tokens",
            "1600",
            "--out",
            str(out),
            "--quality",
            "exact",
            "balanced",
            "--operators",
            "3",
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    wholes = [i for i, row in enumerate(rows) if row["share"] == 1]
    assert [rows[i]["part"].split(",")[0] for i in wholes] == [
        "decode and vision tower",
        "exact",
        "balanced",
    ]
    for start, end in zip(wholes[1:], [*wholes[2:], len(rows)], strict=True):
        parts = {row["part"].strip(): row for row in rows[start + 1 : end]}
        assert {"linear layers", "attention", "all else"} <= set(parts)
        assert sum(row["seconds"] for row in parts.values()) == pytest.approx(
            rows[start]["seconds"]
        )
        assert all(row["flops"] > 0 for name, row in parts.items() if name in _PRODUCTS)
    assert "density 1.000" in rows[wholes[1]]["part"]
    assert "selection" in {row["part"].strip() for row in rows[wholes[2] :]}
    printed = capsys.readouterr().out
    assert "Self CPU" in printed
    assert "linear layers" in printed


_PRODUCTS = ("linear layers", "attention")
