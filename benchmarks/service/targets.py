"""What the rows say about the aims, as ratios within one session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import tables

Row = dict[str, Any]


HEADER = ("what", "mode", "video tokens", "aim", "measured")


def table(found: Sequence[Row], checkpoint: str) -> str:
    """One line per aim and length that was measured on this checkpoint."""
    return tables.markdown(HEADER, lines(found, checkpoint))


def lines(found: Sequence[Row], checkpoint: str) -> list[list[object]]:
    """What ``table`` prints: what, mode, video tokens, aim (or nothing), measured ratio."""
    rows = [r for r in found if r["checkpoint"] == checkpoint and r["first_token_s"] is not None]
    return [
        *_speedups(rows, "balanced", {16384: 3.0, 32768: 5.0}),
        *_speedups(rows, "exact", {}),
        *_shares(rows, "second question / first", 0.05, part=lambda r: r["second_first_token_s"]),
        *_shares(
            rows,
            "hand-off / (vision + prefill)",
            0.03,
            part=lambda r: r["stages"]["handoff"],
            whole=_prefill,
        ),
        *_ranks(rows),
        *_per_token(rows),
    ]


def _of(rows: Sequence[Row], system: str, mode: str | None = None) -> list[Row]:
    return [r for r in rows if r["system"] == system and mode in (None, r["mode"])]


def _speedups(rows: Sequence[Row], mode: str, aims: dict[int, float]) -> list[list[object]]:
    lines: list[list[object]] = []
    for row in _of(rows, "ours", mode):
        if row["speedup_over_vllm"] is None:
            continue
        # A video has at least as many tokens as were asked for, and at most one patch more.
        near = [aim for tokens, aim in aims.items() if tokens <= row["video_tokens"] < 1.1 * tokens]
        aim = f">= {near[0] if near else 1.0:g}" if near or mode == "exact" else None
        lines.append(
            [
                "vLLM alone / ours",
                mode,
                row["video_tokens"],
                aim,
                row["speedup_over_vllm"],
            ]
        )
    return lines


def _first(row: Row) -> float:
    seconds: float = row["first_token_s"]
    return seconds


def _prefill(row: Row) -> float:
    seconds: float = row["stages"]["prefill"] + row["stages"]["vision"]
    return seconds


def _shares(
    rows: Sequence[Row],
    what: str,
    aim: float,
    *,
    part: Callable[[Row], float | None],
    whole: Callable[[Row], float] = _first,
) -> list[list[object]]:
    return [
        [what, row["mode"], row["video_tokens"], f"<= {aim:g}", share / whole(row)]
        for row in _of(rows, "ours")
        if (share := part(row)) is not None and whole(row)
    ]


def _ranks(rows: Sequence[Row]) -> list[list[object]]:
    one = {(r["mode"], r["video_tokens"]): _first(r) for r in _of(rows, "ours-1")}
    return [
        ["1 rank / 2 ranks", row["mode"], row["video_tokens"], ">= 1.7", one[key] / _first(row)]
        for row in _of(rows, "ours")
        if (key := (row["mode"], row["video_tokens"])) in one
    ]


def _per_token(rows: Sequence[Row]) -> list[list[object]]:
    """Time per token against that at the length nearest to 8,192."""
    balanced = _of(rows, "ours", "balanced")
    known = [row for row in balanced if 8192 <= row["video_tokens"] < 1.1 * 8192]
    if not known:
        return []
    base = _first(known[0]) / known[0]["video_tokens"]
    return [
        [
            "time per token / that at 8 K",
            "balanced",
            row["video_tokens"],
            "<= 2" if 65536 <= row["video_tokens"] < 1.1 * 65536 else None,
            _first(row) / row["video_tokens"] / base,
        ]
        for row in balanced
        if row is not known[0]
    ]
