"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_files_of_sequence_parallelism_exist() -> None:
    """Full paths, or the last parts of one."""
    text = (ROOT / "docs" / "sequence_parallelism.md").read_text()
    folders = ("prefill_service", "kernels", "tests", "benchmarks")
    files = [
        f"/{file.relative_to(ROOT)}" for folder in folders for file in (ROOT / folder).rglob("*.py")
    ]
    named = re.findall(r"`([\w/]+\.py)`", text)
    assert len(named) > 40
    assert [name for name in named if not any(f.endswith(f"/{name}") for f in files)] == []
    assert len(re.findall(r"^\| +\d+ \|", text, re.M)) == 20
