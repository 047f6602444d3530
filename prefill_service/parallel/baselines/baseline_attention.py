"""One layer's attention by a published approximate method (Spava, arXiv 2601.21444, section 3).

* anchor rows see the anchor, causally;
* a block sees what earlier blocks passed on, the anchor, and itself causally;
* the question sees everything: each rank computes its part, results and log-sum-exps are gathered
  and merged, which is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, attend, merge
from prefill_service.parallel.baselines.methods import BaselineMethod
from prefill_service.parallel.baselines.passing import passing_counts, start_passing
from prefill_service.parallel.baselines.sequence_split import SequenceSplit
from prefill_service.parallel.process_group import PendingPart, SPGroup

QKV = tuple[Tensor, Tensor, Tensor]
"""A rank's rows: q [q_heads, rows, head_dim], k and v [kv_heads, rows, head_dim]."""


@dataclass(slots=True)
class _Gathered:
    """The question's results: out [P, q_heads, tokens, head_dim], lse [P, q_heads, tokens]."""

    out: Tensor
    lse: Tensor
    arriving: list[PendingPart]

    def merged(self) -> Tensor:
        """[q_heads, tokens, head_dim] over all ranks' keys."""
        for pending in self.arriving:
            pending.wait()
        return merge([Partial(*part) for part in zip(self.out, self.lse, strict=True)]).out


class BaselineAttention:
    """Attention of one rank's rows of a prompt, layer by layer, in step with the other ranks.

    Args:
        group: the ranks.
        split: of the prompt.
        method: what is passed on.
        scale: factor on attention's scores.

    Raises:
        ValueError: a split for another number of ranks.
    """

    def __init__(
        self, group: SPGroup, split: SequenceSplit, method: BaselineMethod, scale: float
    ) -> None:
        if split.ranks != group.size:
            raise ValueError(f"the split is for {split.ranks} ranks, the group has {group.size}")
        self._group = group
        self._split = split
        self._method = method
        self._scale = scale
        self._rows = split.rank_rows(group.rank)
        self._counts = passing_counts(split, method.passing_tokens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer. What is passed on travels while local parts are computed.

        Args:
            q: [q_heads, rows, head_dim], rows as ``SequenceSplit.computed`` has them.
            k, v: [kv_heads, rows, head_dim].

        Returns:
            [q_heads, rows, head_dim]; the question's rows are equal on all ranks.

        Raises:
            ValueError: another number of rows than the split gives this rank.
        """
        rows = self._rows
        if not q.shape[1] == k.shape[1] == v.shape[1] == rows.count:
            raise ValueError(
                f"{q.shape[1]} queries, {k.shape[1]} keys and {v.shape[1]} values; "
                f"rank {self._group.rank} has {rows.count} rows"
            )
        passed = start_passing(
            self._group,
            self._split,
            (q, k, v),
            counts=self._counts,
            score=self._method.score,
        )
        gathered = self._start_question((q, k, v))
        out = torch.empty_like(q)
        qkv = (q, k, v)
        out[:, rows.anchor] = self._attend_part(qkv, rows.anchor, rows.anchor, causal=True).out
        for block, where in zip(self._split.blocks_of(self._group.rank), rows.blocks, strict=True):
            parts = [
                self._attend_part(qkv, where, where, causal=True),
                self._attend_part(qkv, where, rows.anchor, causal=False),
            ]
            earlier = passed.earlier_keys(block)
            parts.append(attend(q[:, where], *earlier, causal=False, scale=self._scale))
            out[:, where] = merge(parts).out
        out[:, rows.question] = gathered.merged()
        passed.wait_all()
        return out

    def _start_question(self, qkv: QKV) -> _Gathered:
        """Attend from the question to the keys that this rank keeps, and send the result to all."""
        group = self._group
        rows = self._rows
        start, end = (rows.anchor.start + token for token in self._split.anchor_slice(group.rank))
        # All of them lie before the question, so there is no mask: a causal one, aligned to the
        # last key as the released code has it, would hide keys from all but the last query.
        keys = [slice(start, end), *rows.blocks]
        parts = [self._attend_part(qkv, rows.question, where, causal=False) for where in keys]
        if group.rank == 0:
            parts.append(self._attend_part(qkv, rows.question, rows.question, causal=True))
        mine = merge(parts)
        out = mine.out.new_empty((group.size, *mine.out.shape))
        lse = mine.lse.new_empty((group.size, *mine.lse.shape))
        out[group.rank] = mine.out
        lse[group.rank] = mine.lse
        arriving = group.all_gather_v(list(out)) + group.all_gather_v(list(lse))
        return _Gathered(out, lse, arriving)

    def _attend_part(self, qkv: QKV, queries: slice, keys: slice, *, causal: bool) -> Partial:
        q, k, v = qkv
        return attend(q[:, queries], k[:, keys], v[:, keys], causal=causal, scale=self._scale)
