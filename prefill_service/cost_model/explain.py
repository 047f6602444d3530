"""Why a candidate was chosen, in words."""

from __future__ import annotations

from collections.abc import Sequence

from prefill_service.cost_model.number_format import duration, gibibytes, gigabytes
from prefill_service.cost_model.request import Candidate, SearchRequest
from prefill_service.cost_model.traffic import queries_move_from
from prefill_service.parallel.exchanges.catalog import ExchangeKind, MeshForm


def explain(request: SearchRequest, chosen: Candidate, fitting: Sequence[Candidate]) -> str:
    """The choice, what it beats, and what its transfers and memory come to."""
    sentences = [_choice(chosen, fitting), *_rivals(chosen, fitting), _transfers(chosen)]
    sentences.append(
        f"Its K/V take {gibibytes(chosen.memory_bytes)} of "
        f"{gibibytes(request.kv_memory_bytes)} per rank."
    )
    if _divides_keys(chosen.strategy.exchange) and chosen.strategy.ranks > 1:
        chunk = min(request.tokens, chosen.chunk_tokens * chosen.strategy.ranks)
        start = queries_move_from(request.shape, chunk)
        sentences.append(
            f"A chunk of {chunk:,} queries moves fewer bytes than the keys from {start:,} keys on."
        )
    return " ".join(sentences)


def _divides_keys(exchange: ExchangeKind) -> bool:
    """Whether each rank keeps the keys of its own tokens only, and all their heads."""
    return exchange.mesh is MeshForm.COLUMN and not exchange.all_tokens


def _choice(chosen: Candidate, fitting: Sequence[Candidate]) -> str:
    fastest = min(fitting, key=lambda candidate: candidate.seconds)
    name = (
        f"{chosen.strategy.label} on {_ranks(chosen)}, "
        f"{chosen.chunk_tokens:,} tokens per chunk and rank"
    )
    of = f"of {len(fitting)} candidates that fit"
    if fastest is chosen:
        return f"{name}: the fastest {of}, {duration(chosen.seconds)}."
    return (
        f"{name}: {duration(chosen.seconds)}; the fastest {of}, {fastest.strategy.label} on "
        f"{_ranks(fastest)} in chunks of {fastest.chunk_tokens:,}, takes "
        f"{duration(fastest.seconds)}: too close to prefer more ranks, more bytes or a less simple "
        "exchange."
    )


def _rivals(chosen: Candidate, fitting: Sequence[Candidate]) -> list[str]:
    others = [c for c in fitting if c.strategy.exchange != chosen.strategy.exchange]
    single = [c for c in fitting if c.strategy.ranks == 1]
    parts = []
    if others:
        best = min(others, key=lambda candidate: candidate.seconds)
        parts.append(
            f"Of other exchanges {best.strategy.label} on {_ranks(best)} is best, "
            f"{duration(best.seconds)}."
        )
    if single and chosen.strategy.ranks > 1:
        alone = min(candidate.seconds for candidate in single)
        parts.append(f"One rank would take {duration(alone)}.")
    return parts


def _transfers(chosen: Candidate) -> str:
    if chosen.strategy.ranks == 1:
        return "Nothing is exchanged."
    received = f"A rank receives {gigabytes(chosen.bytes_received)}"
    share = 1 - chosen.exposed_seconds / chosen.transfer_seconds if chosen.transfer_seconds else 1.0
    return (
        f"{received} in {duration(chosen.transfer_seconds)}, {share:.0%} of it hidden behind "
        "attention."
    )


def _ranks(candidate: Candidate) -> str:
    count = candidate.strategy.ranks
    return f"{count} rank{'s' if count > 1 else ''}"
