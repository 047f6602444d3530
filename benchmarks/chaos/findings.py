"""What a run has found, as rows, a table and a verdict."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import tables
from benchmarks.chaos.census import KINDS
from benchmarks.chaos.clients import Outcome
from benchmarks.chaos.faults import BY_NAME
from benchmarks.chaos.known_answers import Comparison

UNDISTURBED = "undisturbed"
NEVER_RIGHT = frozenset({"INTERNAL", "UNKNOWN", "AssertionError", "TimeoutError"})
"""Reasons that say nothing, and calls without an end."""

NO_ROOM = frozenset({"STORAGE_FULL"})
"""Reasons that are right while the disk is full: there is no other answer to an upload then."""


@dataclass(slots=True)
class Findings:
    """Everything that was measured.

    Attributes:
        recoveries: seconds until the next answer, of each fault; ``None`` if there was none.
        memory: of each kind of process, before and after.
        leftovers: names of what was left after the end, by kind.
        not_run: faults that cannot be inflicted here, of those that were asked for.
        deaths: how often the front end ended without having been told to.
        loads: processes that waited for a core, as each fault was inflicted.
    """

    comparison: Comparison
    outcome: Outcome
    recoveries: dict[str, list[float | None]] = field(default_factory=lambda: defaultdict(list))
    memory: list[dict[str, Any]] = field(default_factory=list)
    leftovers: dict[str, list[str]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    deaths: list[str] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each fault that was inflicted."""
        return [self._row(name, found) for name, found in self.recoveries.items()]

    def _row(self, name: str, found: Sequence[float | None]) -> dict[str, Any]:
        seconds = [value for value in found if value is not None]
        failures: dict[str, int] = {}
        for (disturbance, _, reason), count in self.outcome.failures.items():
            if disturbance == name:
                failures[reason] = failures.get(reason, 0) + count
        fault = BY_NAME.get(name)
        return {
            "fault": name,
            "what": "nothing" if fault is None else fault.part,
            "times": len(found),
            "recovered": len(seconds),
            "median_s": round(statistics.median(seconds), 2) if seconds else None,
            "max_s": round(max(seconds), 2) if seconds else None,
            "target_s": fault.target_s if fault is not None and fault.target_s else None,
            "failures": failures,
        }

    def growth(self) -> list[dict[str, Any]]:
        """Own memory in MiB and descriptors of each kind of process, before and after."""
        if not self.memory:
            return []
        before = self.memory[0]
        after = self.memory[-1]
        return [
            {
                "kind": kind,
                "restarted": before[kind]["pids"] != after[kind]["pids"],
                "start_mib": round(before[kind]["private"] / 2**20, 1),
                "end_mib": round(after[kind]["private"] / 2**20, 1),
                "start_descriptors": before[kind]["descriptors"],
                "end_descriptors": after[kind]["descriptors"],
            }
            for kind in KINDS
            if before[kind]["processes"] or after[kind]["processes"]
        ]

    def faults_found(self) -> list[str]:
        """Why the run is not a success, one sentence each; nothing if it is."""
        found = []
        if self.comparison.mismatches:
            found.append(f"{len(self.comparison.mismatches)} answers differ")
        for (disturbance, action, reason), count in self.outcome.failures.items():
            if reason in NEVER_RIGHT:
                found.append(f"{disturbance}: {action} failed {count} times with {reason}")
        for name, seconds in self.recoveries.items():
            if None in seconds:
                found.append(f"{name}: no answer afterwards")
        for kind, names in self.leftovers.items():
            if names:
                found.append(f"{len(names)} {kind} left over: {', '.join(names[:5])}")
        return found + self.deaths

    def content(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """For the result file."""
        return {
            "settings": {**settings, "load_during": round(statistics.fmean(self.loads or [0]), 1)},
            "rows": self.rows(),
            "compared": dict(self.comparison.compared),
            "mismatches": self.comparison.mismatches,
            "done": dict(self.outcome.done),
            "failures": [
                {"disturbance": key[0], "action": key[1], "reason": key[2], "times": count}
                for key, count in self.outcome.failures.items()
            ],
            "messages": self.outcome.messages,
            "growth": self.growth(),
            "leftovers": {kind: len(names) for kind, names in self.leftovers.items()},
            "leftover_names": {kind: names[:20] for kind, names in self.leftovers.items()},
            "not_run": self.not_run,
            "faults_found": self.faults_found(),
        }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with a line for each fault."""
    header = ("fault", "times", "recovered", "median, s", "max, s", "target, s", "failed calls")
    return tables.markdown(
        header,
        [
            [
                row["fault"],
                row["times"],
                row["recovered"],
                _seconds(row["median_s"]),
                _seconds(row["max_s"]),
                "" if row["target_s"] is None else f"{row['target_s']:g}",
                ", ".join(f"{reason} {n}" for reason, n in row["failures"].items()) or "0",
            ]
            for row in rows
        ],
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
