"""Blocks on what the service withstands: disturbances one after the other, and hours of load."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.report.results import Row, content, rows, seconds, settings

_LOST = "none"
_UNITS = {
    "private": "own memory, MiB",
    "pss": "with its part of shared memory, MiB",
    "descriptors": "descriptors",
}


def chaos() -> str:
    """Recovery after each fault, failed calls, and what must not have happened."""
    header = ("disturbed", "times", "recovery, median, s", "longest, s", "aim, s", "failed calls")
    lines = [
        [
            row["what"],
            row["times"],
            seconds(row["median_s"]),
            seconds(row["max_s"]),
            "" if row["target_s"] is None else f"{row['target_s']:g}",
            ", ".join(f"`{reason}` {times}" for reason, times in row["failures"].items()) or _LOST,
        ]
        for row in rows("chaos-cpu")
    ]
    found = content("chaos-cpu")
    noted = settings("chaos-cpu")
    left = ", ".join(f"{kind} {number}" for kind, number in found["leftovers"].items())
    compared = sum(found["compared"].values())
    text = (
        f"{tables.markdown(header, lines)}\n\n"
        f"{compared} answers were compared, {len(found['mismatches'])} differ. "
        f"Left over after the end: {left}."
    )
    if "load_during" in noted:
        text += (
            f"\nLoad of the machine meanwhile: {noted['load_during']} on {noted['cores']} cores."
        )
    if found["not_run"]:
        text += f"\nNot run: {', '.join(found['not_run'])}."
    return text


def growth() -> str:
    """Own memory and descriptors of each kind of process, before the faults and after."""
    header = ("processes", "memory before, MiB", "after, MiB", "descriptors before", "after")
    lines = [
        [
            row["kind"] + (" (restarted)" if row["restarted"] else ""),
            f"{row['start_mib']:.0f}",
            f"{row['end_mib']:.0f}",
            row["start_descriptors"],
            row["end_descriptors"],
        ]
        for row in content("chaos-cpu")["growth"]
    ]
    return tables.markdown(header, lines)


def _slope(row: Row, which: str) -> str:
    """A slope with its 95 % interval in brackets."""
    interval = f"{row[which + 'low']:+.1f} to {row[which + 'high']:+.1f}"
    return f"{row[which + 'per_hour']:+.1f} ({interval})"


def soak() -> str:
    """Slopes of memory and descriptors by kind of process, and the answers compared."""
    header = ("processes", "measure", "start", "end", "slope per hour", "of the second half")
    lines = [
        [
            row["kind"],
            _UNITS[row["measure"]],
            f"{row['start']:.1f}",
            f"{row['end']:.1f}",
            _slope(row, ""),
            _slope(row, "late_"),
        ]
        for row in rows("soak-cpu")
        if row["measure"] in _UNITS
    ]
    found = content("soak-cpu")
    failed = ", ".join(f"{name} {times}" for name, times in found["failures"].items()) or _LOST
    return (
        f"{tables.markdown(header, lines)}\n\n"
        f"{settings('soak-cpu')['hours']:.1f} hours, {sum(found['done'].values())} actions, "
        f"{sum(found['compared'].values())} answers compared, {len(found['mismatches'])} differ. "
        f"Failed calls: {failed}."
    )
