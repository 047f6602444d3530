"""Committed outputs are what their generators make."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.make_tiny_checkpoint import build
from tools.tiny_families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
STUBS = ROOT / "clients" / "python" / "src" / "prefill"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_stubs_are_up_to_date(tmp_path: Path) -> None:
    command = [sys.executable, "tools/generate_stubs.py", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    committed = contents(STUBS)
    by_hand = {"v1/__init__.py", "v1/py.typed", "__init__.py", "py.typed"}
    assert contents(tmp_path / "prefill") == {
        name: data for name, data in committed.items() if name not in by_hand
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_are_byte_identical(
    family: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The shared one may come from an earlier run; the other is made by a fresh process."""
    command = [sys.executable, "-m", "tools.make_tiny_checkpoint", family, str(tmp_path / "again")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert contents(tmp_path / "again") == contents(checkpoint(family))


def test_checkpoint_is_built_once(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"layers": 1, "hidden": 64, "heads": 1, "kv_heads": 1}
    path = build("qwen3_vl", tmp_path / "model", **shape)
    weights = path / "model.safetensors"
    made = weights.stat().st_mtime_ns
    build("qwen3_vl", path, **shape)
    assert weights.stat().st_mtime_ns == made
    before = weights.read_bytes()
    build("qwen3_vl", path, seed=1, **shape)
    assert weights.read_bytes() != before


def test_checkpoint_refuses_what_it_cannot_build(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'llama' is not one of qwen3_vl, qwen2_5_vl"):
        build("llama", tmp_path / "model")
    with pytest.raises(ValueError, match="heads 4 is not a multiple of kv_heads 3"):
        build("qwen3_vl", tmp_path / "model", kv_heads=3)
    with pytest.raises(ValueError, match="256 != 7 x 64"):
        build("qwen2_5_vl", tmp_path / "model", heads=7, kv_heads=1)
    (tmp_path / "notes").mkdir()
    with pytest.raises(FileExistsError, match="no checkpoint of this tool"):
        build("qwen3_vl", tmp_path / "notes")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
