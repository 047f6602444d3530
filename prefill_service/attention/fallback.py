"""Attention that meets the floor: sparse, measured; if that fails, again, and then densely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefill_service.attention.dense import attend_causal
from prefill_service.attention.key_source import KeySource, Measurement, all_heads
from prefill_service.attention.quality import FLOOR_TOLERANCE
from prefill_service.attention.sparse.attend import SparseResult, sparse_attention
from prefill_service.attention.sparse.cpu_backend import GatherBuffers
from prefill_service.attention.sparse.summaries import BlockSummaries
from prefill_service.attention.sparse.tiles import Tiles
from prefill_service.attention.stopwatch import Stopwatch
from prefill_service.attention.verification import Certificate, finite_rows

_RETRY_FACTORS = (0.25, 0.0625)
_STRETCH = 4
_STRETCH_SHARE = 0.5
"""A few neighbouring samples may lie below the floor by chance, but not this far below."""


@dataclass(slots=True)
class Certified:
    """Attention of a run of queries, as it is used.

    Attributes:
        out: [q_heads, queries, head_dim].
        keep: [kv_heads, tiles, blocks] bool, blocks attended exactly.
        attended: [kv_heads] key columns (``LayerReport.attended``), on the host.
        proof: of ``out``.
        redone, dense: KV heads computed with a smaller epsilon, and densely.
        pairs: key columns of all that was computed, what was then computed again included.
        select_s, attend_s: seconds, those of what was computed again included.
    """

    out: Tensor
    keep: Tensor
    attended: Tensor
    proof: Certificate
    redone: int = 0
    dense: int = 0
    pairs: float = 0.0
    select_s: float = 0.0
    attend_s: float = 0.0


def below_floor(kept_mass: Tensor, floor: float) -> Tensor:
    """Which KV heads have a query head that misses the floor.

    A query head does where the mean over its rows is below the floor, or the mean over any four
    neighbouring ones is below half of it. docs/attention.md says why not below all of it.

    Args:
        kept_mass: [kv_heads, group, samples].

    Returns:
        [kv_heads] bool.
    """
    floor -= FLOOR_TOLERANCE
    stretch = min(_STRETCH, kept_mass.shape[2])
    stretches = kept_mass.unfold(2, stretch, 1).mean(-1)
    poor = (stretches.amin(2) < _STRETCH_SHARE * floor) | (kept_mass.mean(2) < floor)
    return poor.any(1)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer's attention of one run of queries.

    Attributes:
        source: of keys that are not here.
        summaries: of the keys' blocks.
        forced: [tiles, blocks] bool (``forced_blocks``).
        scale: factor on the scores.
        sampled: [samples] queries that are measured.
        weights: [samples, keys] for ``Certificate.weighted``.
        closer: more queries, measured where ``sampled`` misses the floor.
        epsilon: [kv_heads] attention mass that selection may misplace.
        row_limit: [kv_heads] loss in one row from which a block is kept.
    """

    source: KeySource
    summaries: BlockSummaries
    tiles: Tiles
    forced: Tensor
    scale: float
    buffers: GatherBuffers
    sampled: Tensor
    weights: Tensor
    closer: Tensor
    epsilon: Tensor
    row_limit: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, floor: float) -> Certified:
        """Attention that holds the floor wherever that is a matter of approximation.

        Args:
            q: [q_heads, queries, head_dim].
            k, v: [kv_heads, keys, head_dim].
            floor: kept mass (``AttentionPolicy.min_kept_mass``).
        """
        heads = all_heads(k)
        used = self._sparse(q, k, v, heads, 1.0)
        proof = self._certify(q, k, v, used, heads, self.sampled, self.weights)
        done = Certified(used.out, used.keep, used.attended(self.tiles), proof)
        done.pairs = float(done.attended.sum())
        clocks = [used.clock]
        poor = heads[self._misses(q, k, v, used, heads, proof.kept_mass, floor)]
        done.redone = len(poor)
        if len(poor):  # all their blocks at once: what k and v are copied from must be there
            every = torch.ones(len(poor), self.tiles.blocks, dtype=torch.bool, device=k.device)
            self.source.fetch(every, poor)
        for factor in _RETRY_FACTORS:
            if not len(poor):
                break
            retry = self._sparse(q, k, v, poor, factor)
            again = self._certify(q, k, v, retry, poor, self.sampled)
            _rows(done.out, len(k))[poor] = _rows(retry.out, len(poor))
            done.keep[poor], done.attended[poor.cpu()] = retry.keep, retry.attended(self.tiles)
            done.pairs += float(done.attended[poor.cpu()].sum())
            proof.kept_mass[poor], proof.output_error[poor] = again.kept_mass, again.output_error
            clocks.append(retry.clock)
            poor = poor[self._misses(q, k, v, retry, poor, again.kept_mass, floor)]
        if len(poor):
            clocks.append(self._dense(q, k, v, poor, done))
        done.select_s = sum(clock.seconds("select") for clock in clocks)
        done.attend_s = sum(clock.seconds("attend") for clock in clocks)
        return done

    def _sparse(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, factor: float
    ) -> SparseResult:
        """Sparse attention of some KV heads, with ``factor`` times their epsilon and row limit."""
        epsilon = factor * self.epsilon[heads]
        q, k, v, summaries = self._of(q, k, v, heads)
        return sparse_attention(
            q, k, v, summaries, self.tiles, epsilon, self.forced, self.scale, self.buffers,
            lambda wanted: self.source.fetch(wanted, heads),
            lambda rows, keep, tiles, pairs: self.source.share(rows, keep, tiles, pairs, heads),
            factor * self.row_limit[heads],
        )  # fmt: skip

    def _certify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: SparseResult,
        heads: Tensor,
        sampled: Tensor,
        weights: Tensor | None = None,
    ) -> Certificate:
        """Measure sampled rows of ``result``, which is of the KV heads ``heads``."""
        q, k, v, summaries = self._of(q, k, v, heads)
        asked = Measurement(self.tiles, self.scale, heads, sampled, weights)
        return self.source.certify(q, k, v, result, summaries, asked, self.buffers)

    def _misses(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        result: SparseResult,
        heads: Tensor,
        kept_mass: Tensor,
        floor: float,
    ) -> Tensor:
        """Which of the KV heads ``heads`` miss the floor, as indices of ``result`` and ``heads``.

        A few rows miss it often by chance. Looking closer costs less than computing again.
        """
        poor = below_floor(kept_mass, floor).nonzero()[:, 0]
        if not len(poor):
            return poor
        closer = self._certify(q, k, v, result.heads(poor), heads[poor], self.closer)
        return poor[below_floor(closer.kept_mass, floor)]

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor, done: Certified) -> Stopwatch:
        """Attend to all keys of some KV heads, and note that in ``done``."""
        clock, tiles = Stopwatch(k.device), self.tiles
        q = _rows(q, len(k))[heads].flatten(0, 1)
        dense = _rows(attend_causal(q, k[heads], v[heads], tiles.q_offset, self.scale).out,
                      len(heads))  # fmt: skip
        _rows(done.out, len(k))[heads] = dense
        clock.lap("attend")
        done.keep[heads] = ~tiles.hidden(k.device)
        done.attended[heads.cpu()] = float(tiles.causal_keys)
        done.dense = len(heads)
        done.pairs += float(tiles.causal_keys * len(heads))
        # Dense is exact by definition, but what is not a number has no certificate.
        kept = finite_rows(dense[:, :, self.sampled.to(k.device)]).to(done.proof.kept_mass.dtype)
        done.proof.kept_mass[heads], done.proof.output_error[heads] = kept, 1 - kept
        return clock

    def _of(
        self, q: Tensor, k: Tensor, v: Tensor, heads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, BlockSummaries]:
        if len(heads) == len(k):
            return q, k, v, self.summaries
        rows = _rows(q, len(k))[heads].flatten(0, 1)
        return rows, k[heads], v[heads], self.summaries.heads(heads)


def _rows(x: Tensor, kv_heads: int) -> Tensor:
    """[q_heads, ...] as [kv_heads, group, ...] (a view)."""
    return x.view(kv_heads, -1, *x.shape[1:])
