"""Partial results of a chunk's queries while keys arrive part by part."""

from __future__ import annotations

import torch
from torch import Tensor

from prefill_service.attention.dense import Partial, attend, empty_partial, merge
from prefill_service.parallel.head_partition import HeadSplit
from prefill_service.parallel.token_layout import HeldTokens, Range


class OnlineSoftmax:
    """Queries of some ranges of the prompt, and their attention over the keys that have arrived.

    Args:
        q: [q_heads, queries, head_dim], the ranges' queries in order.
        ranges: ascending; a key range of any rank lies before, after, or is one of them.
        heads, part: which heads ``q`` has.
        scale: factor on the scores.
    """

    def __init__(
        self, q: Tensor, ranges: list[Range], *, heads: HeadSplit, part: int, scale: float
    ) -> None:
        self._heads = heads
        self._part = part
        self._scale = scale
        self._ranges = ranges
        sizes = [end - start for start, end in ranges]
        self._queries = list(torch.split(q, sizes, 1)) if ranges else []
        self._partials: list[Partial | None] = [None] * len(ranges)
        self._like = q

    def attend_held(self, kv: Tensor, first_row: int, held: HeldTokens, member: int) -> None:
        """Attend to what each query may see of the keys of a member of the group.

        Args:
            kv: [keys, 2, kv_heads, head_dim], rows ``first_row`` and after of what it holds.
        """
        for index, (start, _) in enumerate(self._ranges):
            visible = min(held.count_before(member, start) - first_row, len(kv))
            if visible > 0:
                self._add(index, kv[:visible], causal=False)

    def attend_own(self, kv: Tensor, held: HeldTokens, member: int) -> None:
        """Attend, under the causal mask, to the ranges' own keys.

        Args:
            kv: [keys, 2, kv_heads, head_dim], all that ``member``, which has the ranges, holds.
        """
        for index, (start, end) in enumerate(self._ranges):
            first = held.count_before(member, start)
            self._add(index, kv[first : first + end - start], causal=True)

    def result(self) -> Partial:
        """[q_heads, queries, ...] over all keys that have arrived, in the queries' precision."""
        if not self._queries:
            return empty_partial(self._like)
        found = [
            empty_partial(queries) if partial is None else partial
            for queries, partial in zip(self._queries, self._partials, strict=True)
        ]
        out = torch.cat([partial.out for partial in found], 1).to(self._like.dtype)
        return Partial(out, torch.cat([partial.lse for partial in found], 1))

    def _add(self, index: int, kv: Tensor, causal: bool) -> None:
        k, v = kv.permute(1, 2, 0, 3)  # each [kv_heads, keys, head_dim]
        q = self._queries[index]
        parts = [
            attend(q[queries], k[keys], v[keys], causal=causal, scale=self._scale)
            for queries, keys in self._heads.runs(self._part)
        ]
        found = parts[0] if len(parts) == 1 else _concatenate_heads(parts)
        # In the precision of the log-sum-exp: many parts must not round many times.
        found = Partial(found.out.to(found.lse.dtype), found.lse)
        before = self._partials[index]
        self._partials[index] = found if before is None else merge([before, found])


def _concatenate_heads(parts: list[Partial]) -> Partial:
    return Partial(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))
