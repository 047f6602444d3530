"""What one rank receives per layer, by the papers' formulas: even shares, one chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefill_service.parallel.exchanges.catalog import ExchangeKind
from tests.parallel.conformance import HEAD_DIM, Case


@dataclass(frozen=True)
class Published:
    """The letters of the formulas: N tokens, P ranks in rows of U and columns of R."""

    n: int
    p: int
    u: int
    h_q: int
    h_kv: int
    d: int = HEAD_DIM
    e: int = 8

    @property
    def r(self) -> int:
        return self.p // self.u


def keys_to_all(f: Published) -> int:
    return 2 * f.h_kv * f.d * f.e * f.n * (f.p - 1) // f.p


def ulysses(f: Published) -> int:
    return (2 * f.h_q + 2 * f.h_kv) * f.d * f.e * f.n * (f.p - 1) // f.p**2


def rows_and_columns(f: Published) -> int:
    heads = (2 * f.h_q + 2 * f.h_kv) * f.d * f.e * (f.n // f.p) * (f.u - 1) // f.u
    return heads + 2 * f.h_kv * f.d * f.e * f.n * (f.r - 1) // f.p


def pass_q(f: Published) -> int:
    return f.h_q * (2 * f.d + 1) * f.e * f.n * (f.p - 1) // f.p


FORMULAS: dict[str, Callable[[Published], int]] = {
    "gather": keys_to_all,
    "ring": keys_to_all,
    "multi_ring": keys_to_all,
    "ulysses": ulysses,
    "usp": rows_and_columns,
    "ulysses_gather": rows_and_columns,
    "pass_q": pass_q,
}
"""By exchange, of all whose bytes are known before the prefix is computed."""


def published_bytes(kind: ExchangeKind, ranks: int, degree: int, case: Case) -> int:
    if kind.name not in FORMULAS:
        raise LookupError(f"{kind} has no formula: add its `bytes_received` in {__file__}")
    letters = Published(n=case.tokens, p=ranks, u=degree, h_q=case.q_heads, h_kv=case.kv_heads)
    return FORMULAS[kind.name](letters)
