"""What blocks pass on: which keys, and how their K and V reach the other ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from prefill_service.parallel.baselines.methods import PassingScore
from prefill_service.parallel.baselines.sequence_split import SequenceSplit
from prefill_service.parallel.process_group import PendingPart, SPGroup

POOL = 5
"""Neighbouring keys over which a score is the maximum (APB and Spava)."""


def passing_scores(question: Tensor, k: Tensor, score: PassingScore) -> Tensor:
    """How much each key of a block is worth passing on.

    Args:
        question: [q_heads, question tokens, head_dim] queries.
        k: [kv_heads, keys, head_dim], one block's.
        score: the rule.

    Returns:
        [kv_heads, keys], float32 at least.
    """
    kv_heads, _, head_dim = k.shape
    precise = torch.promote_types(k.dtype, torch.float32)
    grouped = question.reshape(kv_heads, -1, head_dim).to(
        precise
    )  # [kv_heads, queries_per_kv * tokens, d]
    if score is PassingScore.MEAN:
        # The mean of dot products is the dot product with the mean.
        return (k.to(precise) @ grouped.mean(1)[..., None])[..., 0]
    return (grouped @ k.to(precise).mT).amax(1)


def choose_keys(scores: Tensor, count: int) -> Tensor:
    """The keys that pass: those with the largest score within ``POOL // 2`` keys.

    Neighbours share a maximum; of them those with the larger own score go first, so that a key
    that stands out passes however few do.

    Args:
        scores: [kv_heads, keys] of one block. What lies beyond it on its rank is no neighbour.
        count: keys to choose.

    Returns:
        [kv_heads, count] int64, ascending.
    """
    pooled = torch.nn.functional.max_pool1d(scores, POOL, stride=1, padding=POOL // 2)
    by_own = scores.argsort(dim=-1, descending=True, stable=True)
    by_pooled = pooled.gather(-1, by_own).argsort(dim=-1, descending=True, stable=True)
    return by_own.gather(-1, by_pooled[:, :count]).sort(dim=-1)[0]


@dataclass(slots=True)
class PassedKV:
    """Passing sets of all blocks on one rank, some still under way.

    Attributes:
        kv: [keys, 2, kv_heads, head_dim], block after block.
        ends: rows up to the end of each block's set.
        arriving: broadcasts under way, by block.
    """

    kv: Tensor
    ends: list[int]
    arriving: dict[int, PendingPart] = field(default_factory=dict)

    def passing_set(self, block: int) -> Tensor:
        """K and V that one block passes on: [keys, 2, kv_heads, head_dim], a view."""
        return self.kv[self.ends[block - 1] if block else 0 : self.ends[block]]

    def earlier_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """Wait for the sets of earlier blocks: [kv_heads, keys, head_dim] K and V."""
        for index in range(block):
            self._wait(index)
        k, v = self.kv[: self.ends[block - 1] if block else 0].permute(1, 2, 0, 3)
        return k, v

    def wait_all(self) -> None:
        """Wait for all sets, also those that this rank does not read."""
        for index in list(self.arriving):
            self._wait(index)

    def _wait(self, block: int) -> None:
        if block in self.arriving:
            self.arriving.pop(block).wait()


def passing_counts(split: SequenceSplit, passing_tokens: int) -> list[int]:
    """Keys per KV head that each block passes on; a short block passes all it has."""
    if split.ranks == 1:
        return [0] * split.num_blocks  # nobody to read them
    sizes = [end - start for start, end in map(split.block, range(split.num_blocks))]
    return [min(size, passing_tokens) for size in sizes]


def start_passing(
    group: SPGroup,
    split: SequenceSplit,
    qkv: tuple[Tensor, Tensor, Tensor],
    *,
    counts: list[int],
    score: PassingScore,
) -> PassedKV:
    """Choose this rank's passing sets and send each to all ranks, as soon as it is chosen.

    Every set goes everywhere, as published, also to ranks that have no later block: per rank and
    layer ``2 (P-1) l_p 2 kv_heads d e`` bytes are received with two blocks a rank.

    Args:
        group: the ranks.
        split: of the prompt.
        qkv: of the rank's rows: q [q_heads, rows, head_dim], k and v [kv_heads, rows, head_dim].
        counts: ``passing_counts``.
        score: the rule by which keys are chosen.
    """
    q, k, v = qkv
    rows = split.rank_rows(group.rank)
    mine = split.blocks_of(group.rank)
    ends = list(accumulate(counts))
    kv_heads, _, head_dim = k.shape
    passed = PassedKV(k.new_empty((ends[-1], 2, kv_heads, head_dim)), ends)
    for index, (block, where) in enumerate(zip(mine, rows.blocks, strict=True)):
        if counts[block]:
            scores = passing_scores(q[:, rows.question], k[:, where], score)
            chosen = choose_keys(scores, counts[block])[..., None].expand(-1, -1, head_dim)
            place = passed.passing_set(block)  # [count, 2, kv_heads, head_dim]
            for part, source in enumerate((k, v)):
                place[:, part] = source[:, where].gather(1, chosen).transpose(0, 1)
        theirs = [split.blocks_of(rank)[index] for rank in range(group.size)]
        for pending in group.all_gather_v([passed.passing_set(block) for block in theirs]):
            passed.arriving[theirs[pending.source]] = pending
    return passed
