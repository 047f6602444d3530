"""The result of a search as a table, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from prefill_service.cost_model.number_format import duration, gibibytes, gigabytes
from prefill_service.cost_model.request import Candidate, SearchResult
from prefill_service.parallel.exchanges.catalog import ExchangeKind

_HEADER = ("", "exchange", "ranks", "chunk", "seconds", "received/rank", "K/V per rank", "")
_LEFT_COLUMNS = (0, 1, 7)


def best_of_each(result: SearchResult) -> list[Candidate]:
    """Keep the candidate of each exchange and mesh that would be chosen first.

    Where none can be chosen, the one that was rejected with the least memory, or the one on the
    most ranks if it cannot run at all.
    """
    best: dict[tuple[ExchangeKind, int], Candidate] = {}
    for candidate in (result.chosen, *result.candidates):
        key = (candidate.strategy.exchange, _degree(candidate))
        first = best.setdefault(key, candidate)
        if first.rejected is not None and _more_informative(candidate, first):
            best[key] = candidate
    return list(best.values())


def table(candidates: Iterable[Candidate], chosen: Candidate) -> str:
    """Aligned columns, a ``*`` before the chosen one."""
    rows = [_HEADER, *(_row(candidate, chosen) for candidate in candidates)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    return "\n".join(_line(row, widths) for row in rows)


def result_json(result: SearchResult) -> dict[str, Any]:
    """The search result as JSON values, in seconds and bytes."""
    return {
        "chosen": candidate_json(result.chosen),
        "reason": result.reason,
        "candidates": [candidate_json(candidate) for candidate in result.candidates],
    }


def candidate_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as JSON values, its strategy's fields beside the others."""
    values = asdict(candidate)
    strategy = candidate.strategy
    del values["strategy"]
    mesh = {
        "exchange": str(strategy.exchange),
        "ranks": strategy.ranks,
        "ulysses": strategy.ulysses,
    }
    return mesh | values


def _more_informative(candidate: Candidate, first: Candidate) -> bool:
    """Whether the second of two rejected candidates is nearer to one that can be chosen."""
    if candidate.memory_bytes and first.memory_bytes:
        return candidate.memory_bytes < first.memory_bytes
    if candidate.memory_bytes or first.memory_bytes:
        return bool(candidate.memory_bytes)
    return candidate.strategy.ranks > first.strategy.ranks


def _degree(candidate: Candidate) -> int:
    """Ranks of a row of the mesh, where that is a choice."""
    return candidate.strategy.ulysses if candidate.strategy.exchange.two_dimensional else 0


def _row(candidate: Candidate, chosen: Candidate) -> Sequence[str]:
    strategy = candidate.strategy
    if not candidate.memory_bytes:  # it cannot run at all
        return ("", strategy.label, str(strategy.ranks), "", "", "", "", candidate.rejected or "")
    return (
        "*" if candidate is chosen else "",
        strategy.label,
        str(strategy.ranks),
        f"{candidate.chunk_tokens:,}",
        duration(candidate.seconds),
        gigabytes(candidate.bytes_received),
        gibibytes(candidate.memory_bytes),
        candidate.rejected or "",
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if column in _LEFT_COLUMNS else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
