"""Attention that meets the floor: select, attend, verify, and where that fails fall back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prefill_service.attention.dense import attend_causal
from prefill_service.attention.key_source import KeySource
from prefill_service.attention.quality import FLOOR_TOLERANCE
from prefill_service.attention.sparse.problem import (
    SparseBackend,
    SparseProblem,
    SparseResult,
    by_kv_head,
)
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention.verification import SampledRows, Verification, finite_rows

EPSILON_FACTORS = (1.0, 1 / 4, 1 / 16)
"""Epsilons that are tried, relative to the one asked for, before attention goes dense."""

_STRETCH = 4
_STRETCH_SHARE = 0.5
"""A few neighbouring samples may lie below the floor by chance, but not this far below."""


def below_floor(kept_mass: Tensor, floor: float) -> Tensor:
    """Which KV heads have a query head that misses the floor.

    A query head does where the mean over its rows is below the floor, or the mean over any four
    neighbouring ones is below half of it. docs/attention.md says why not below all of it.

    Args:
        kept_mass: [kv_heads, queries_per_kv, samples].
        floor: least kept mass.

    Returns:
        [kv_heads] bool.
    """
    floor -= FLOOR_TOLERANCE
    stretch = min(_STRETCH, kept_mass.shape[2])
    stretches = kept_mass.unfold(2, stretch, 1).mean(-1)
    failing = (stretches.amin(2) < _STRETCH_SHARE * floor) | (kept_mass.mean(2) < floor)
    return failing.any(1)


@dataclass(slots=True)
class VerifiedAttention:
    """Attention of a run of queries, as it is used; filled attempt by attempt.

    Attributes:
        out: [q_heads, queries, head_dim].
        keep: [kv_heads, tiles, blocks] bool, blocks attended exactly.
        attended: [kv_heads] key columns (``LayerReport.attended``), on the host.
        verification: of ``out``.
        attempts: how many sparse attentions there were.
        redone, dense: KV heads computed with a smaller epsilon, and densely.
        pairs: key columns of all that was computed, what was then computed again included.
        clocks: of every attempt.
    """

    out: Tensor = field(init=False)
    keep: Tensor = field(init=False)
    attended: Tensor = field(init=False)
    verification: Verification = field(init=False)
    attempts: int = 0
    redone: int = 0
    dense: int = 0
    pairs: float = 0.0
    clocks: list[Stopwatch] = field(default_factory=list)

    def record(
        self, problem: SparseProblem, result: SparseResult, verification: Verification
    ) -> None:
        """Use a sparse result; the first one is of all KV heads, others of ``problem.heads``."""
        attended = result.attended(problem.tiles)
        if self.attempts == 0:
            self.out = result.out
            self.keep = result.keep
            self.attended = attended
            self.verification = verification
        else:
            heads = problem.heads
            by_kv_head(self.out, len(self.keep))[heads] = by_kv_head(result.out, len(heads))
            self.keep[heads] = result.keep
            self.attended[heads.cpu()] = attended
            self.verification.kept_mass[heads] = verification.kept_mass
            self.verification.output_error[heads] = verification.output_error
        if self.attempts == 1:
            self.redone = len(problem.heads)
        self.attempts += 1
        self.pairs += float(attended.sum())
        self.clocks.append(result.clock)

    def record_dense(self, problem: SparseProblem, sampled: Tensor) -> None:
        """Attend to all keys of the KV heads of ``problem``, and use that."""
        clock = Stopwatch(problem.k.device)
        tiles = problem.tiles
        heads = problem.heads
        exact = attend_causal(
            problem.q, problem.k, problem.v, q_offset=tiles.q_offset, scale=problem.scale
        )
        dense = by_kv_head(exact.out, len(heads))
        by_kv_head(self.out, len(self.keep))[heads] = dense
        clock.lap("attend")
        self.clocks.append(clock)
        self.keep[heads] = ~tiles.hidden(problem.k.device)
        self.attended[heads.cpu()] = float(tiles.causal_keys)
        self.dense = len(heads)
        self.pairs += float(tiles.causal_keys * len(heads))
        # Dense is exact by definition, but what is not a number is not verified.
        rows = dense[:, :, sampled.to(dense.device)]
        kept = finite_rows(rows).to(self.verification.kept_mass.dtype)
        self.verification.kept_mass[heads] = kept
        self.verification.output_error[heads] = 1 - kept

    def seconds(self, name: str) -> float:
        """Time spent in "select" or "attend", that of what was computed again included."""
        return sum(clock.seconds(name) for clock in self.clocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackAttention:
    """How a layer's attention of a run of queries is computed.

    Attributes:
        backend: computes what is sparse.
        source: of the keys.
        sampled: queries that are verified.
        recheck: [samples] more queries, verified where ``sampled`` misses the floor.
        min_kept_mass: the floor (``AttentionPolicy.min_kept_mass``).
    """

    backend: SparseBackend
    source: KeySource
    sampled: SampledRows
    recheck: Tensor
    min_kept_mass: float

    def attend_verified(self, problem: SparseProblem) -> VerifiedAttention:
        """Attention that holds the floor wherever that is a matter of approximation.

        KV heads that miss the floor at epsilon are computed again at epsilon / 4, then at
        epsilon / 16, then densely.

        Args:
            problem: of all KV heads that are attended to on this rank.
        """
        used = VerifiedAttention()
        sampled = self.sampled
        failing = problem.heads
        for factor in EPSILON_FACTORS:
            attempt = problem.of_heads(failing).stricter(factor)
            result = self.backend.attend_sparse(attempt, self.source)  # select, attend
            verification = self.source.verify_rows(attempt, result, sampled)
            used.record(attempt, result, verification)
            failing = self._failing_heads(attempt, result, verification.kept_mass)
            if not len(failing):
                return used
            self._fetch_all_blocks(attempt, failing)  # before K and V of these heads are copied
            sampled = replace(sampled, weights=None)  # these are of exact attention: once is enough
        used.record_dense(problem.of_heads(failing), sampled.rows)
        return used

    def _failing_heads(
        self, problem: SparseProblem, result: SparseResult, kept_mass: Tensor
    ) -> Tensor:
        """Which of ``problem.heads`` miss the floor, by the rows verified and by others.

        A few rows miss it often by chance. To verify more of them costs less than to compute again.
        """
        index = below_floor(kept_mass, self.min_kept_mass).nonzero()[:, 0]
        if not len(index):
            return index
        verification = self.source.verify_rows(
            problem.of_heads(index), result.of_heads(index), SampledRows(self.recheck)
        )
        index = index[below_floor(verification.kept_mass, self.min_kept_mass)]
        return problem.heads[index]

    def _fetch_all_blocks(self, problem: SparseProblem, heads: Tensor) -> None:
        shape = (len(heads), problem.tiles.blocks)
        self.source.fetch_blocks(
            torch.ones(shape, dtype=torch.bool, device=problem.k.device), heads
        )
