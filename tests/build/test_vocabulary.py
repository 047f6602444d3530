"""One word for each thing: words that the glossary has replaced do not come back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("prefill_service", "kernels/src", "clients/python/src/prefill_client")

# Retired words and what is said instead (docs/architecture.md has the glossary).
RETIRED = {
    "team": "subgroup",
    "teams": "subgroups",
    "overtaken": "preempted",
    "overtaking": "preemption",
    "cadence": "sync interval",
    "feeder": "frame prefetch",
    "meter": "comm stats",
    "homes": "owners",
    "witness": "remote verification",
    "witnesses": "remote verification",
    "certified": "verified",
    "condemn": "invalidate",
    "inventory": "repository",
    "job book": "job registry",
    "house": "repository or package",
    "giver": "from_rank, of a delegation",
    "taker": "to_rank, of a delegation",
    "exchange planner": "exchange chooser",
    "moved tile": "delegated tile",
    "moved tiles": "delegated tiles",
    "next generation": "next epoch",
    "earlier generation": "earlier epoch",
    "comparison mode": "baseline",
    "comparison modes": "baselines",
    "service plan": "service estimate",
}
# Words that some code still has.
STILL_THERE = {
    "homes",
}


def occurrences(word: str) -> list[str]:
    """Where a word stands in code and documents, alone or as a part of a name in snake case."""
    pattern = re.compile(rf"(?<![a-z]){word.replace(' ', '[ _]')}(?![a-z])", re.I)
    code = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*code, *sorted((ROOT / "docs").glob("*.md"))]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize("word", [word for word in RETIRED if word not in STILL_THERE])
def test_retired_words_do_not_come_back(word: str) -> None:
    assert occurrences(word) == [], f"say {RETIRED[word]!r}"
