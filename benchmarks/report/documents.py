"""Generated blocks of the documents: what they contain and how they are put in place.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import tables
from benchmarks.report import charts, field_limits, parallel, quality, robustness, service, versions
from benchmarks.report.results import settings

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)

# Each result file, and the command that writes it.
COMMANDS = {
    "service-cpu": "make bench-service",
    "fidelity": "make bench-fidelity",
    "sampling": "python -m benchmarks.quality.fidelity.variable_rate",
    "selection": "make bench-selection",
    "selection-trained": "make bench-selection",
    "attention-cpu": "make bench-attention",
    "profile-cpu": "python -m benchmarks.attention.profile_prefill",
    "load-cpu": "python -m benchmarks.load",
    "long-question-cpu": "python -m benchmarks.load.long_question",
    "chaos-cpu": "python -m benchmarks.chaos",
    "soak-cpu": "python -m benchmarks.soak",
    "ingest-cpu": "python -m benchmarks.ingest.decoding",
    "hour-cpu": "python -m benchmarks.ingest.hour",
    "sp-sparse": "python -m benchmarks.parallel.sparse",
    "sp-balance": "python -m benchmarks.parallel.balance",
    "sp-scaling": "make bench-scaling",
    "versions": "make test-versions",
}


def result_files() -> str:
    """Every result file: its command, the day, the machine and the versions."""
    lines = []
    for name, command in COMMANDS.items():
        noted = settings(name)
        machine = f"{noted['cores']} cores, {noted['cpu']}"
        versions = f"torch {noted['torch']}, Python {noted['python']}"
        lines.append([f"`{name}.json`", f"`{command}`", noted["date"], machine, versions])
    return tables.markdown(("file", "command", "measured on", "machine", "versions"), lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "result-files": result_files,
    "machine": service.machine,
    "readme-table": service.readme,
    "first-token": service.first_token,
    "aims": service.aims,
    "stages": service.stages,
    "load": service.load,
    "long-question": service.long_question,
    "chaos": robustness.chaos,
    "chaos-growth": robustness.growth,
    "soak": robustness.soak,
    "profile": service.profile,
    "ingest": service.ingest,
    "hour": service.hour,
    "quality-dial": quality.dial,
    "fidelity": quality.fidelity,
    "fidelity-service": quality.through_service,
    "adversarial": quality.adversarial,
    "published-methods": quality.published,
    "sampling": quality.sampling,
    "selection": quality.selection_mixture,
    "selection-trained": quality.selection_trained,
    "attention-cpu": quality.attention_cpu,
    "exchanges": parallel.exchanges,
    "bytes-by-exchange": parallel.bytes_by_exchange,
    "load-balance": parallel.balance,
    "formulas-checked": parallel.checked,
    "projection": parallel.projected,
    "projection-assumptions": parallel.assumed,
    "version-runs": versions.runs,
    "field-limits": field_limits.fields,
}

CHARTS: dict[str, Callable[[], str]] = {"first-token.svg": charts.first_token}


def filled(text: str) -> str:
    """The text with all of its generated blocks as the result files have them now.

    Raises:
        KeyError: a block that nobody knows.
    """
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[4]}", text)


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that may have generated blocks."""
    return [*root.glob("README.md"), *sorted((root / "docs").glob("*.md"))]


def stale(root: Path = ROOT, charts: Mapping[str, Callable[[], str]] = CHARTS) -> dict[Path, str]:
    """What each document and chart below ``root`` that is not up to date should contain."""
    wanted = {path: filled(path.read_text()) for path in documents(root)}
    wanted |= {root / "docs" / "images" / name: draw() for name, draw in charts.items()}
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text
    }
