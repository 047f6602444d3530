"""Prompts for the published methods, and each method written down as an explicit mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prefill_service.parallel.baselines.methods import (
    BaselineMethod,
    BaselineName,
    PassingScore,
    baseline_method,
)
from prefill_service.parallel.baselines.sequence_split import SequenceSplit
from tests.parallel.even_split import split_evenly

HEAD_DIM = 16
SCALE = 0.25
E = 8
SPAVA = BaselineName.SPAVA
STAR = BaselineName.STAR
APB = BaselineName.APB
ALL = 1 << 20


@dataclass(frozen=True)
class Case:
    """One prompt. ``blocks``: sizes of the first blocks if not even; the last has the rest."""

    method: BaselineName
    context: int
    question: int
    anchor: int | None
    passing: int | None
    kv_heads: int = 2
    ratio: int = 1
    blocks: tuple[int, ...] = ()

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.ratio

    def baseline(self, ranks: int) -> BaselineMethod:
        return baseline_method(
            self.method,
            self.context,
            ranks,
            anchor_tokens=self.anchor,
            passing_tokens=self.passing,
        )

    def split(self, ranks: int) -> SequenceSplit:
        method = self.baseline(ranks)
        even = split_evenly(self.context, self.question, ranks, method, text_tokens=4)
        if not self.blocks or ranks == 1:
            return even
        sizes = self.blocks[: even.num_blocks - 1]
        ends = [even.anchor_tokens + sum(sizes[: i + 1]) for i in range(len(sizes))]
        return replace(even, block_ends=(*ends, self.context))


def cases(ranks: int) -> dict[str, Case]:
    blocks = 1 if ranks == 1 else 2 * ranks
    return {
        "all pass, ratio 1": Case(SPAVA, 101, 5, 10, ALL),
        "all pass, ratio 4": Case(SPAVA, 101, 5, 10, ALL, 2, 4),
        "all pass, ratio 7": Case(SPAVA, 101, 5, 10, ALL, 1, 7),
        "all pass, uneven": Case(SPAVA, 120, 3, 7, ALL, 2, 2, (1, 30, 2, 19, 3, 5, 1)),
        "some pass, ratio 1": Case(SPAVA, 101, 5, 10, 4),
        "some pass, ratio 4": Case(SPAVA, 101, 5, 10, 4, 2, 4),
        "some pass, ratio 7": Case(SPAVA, 101, 5, 10, 7, 1, 7),
        "some pass, uneven": Case(SPAVA, 120, 3, 7, 4, 2, 2, (1, 30, 2, 19, 3, 5, 1)),
        "even": Case(SPAVA, 12 + blocks * 11, 6, 12, 5, 2, 4),
        "question of one": Case(SPAVA, 60, 1, 5, 2, 1, 4),
        "blocks of one": Case(SPAVA, 3 + blocks, 2, 3, 2),
        "no anchor": Case(SPAVA, 61, 4, 0, 3),
        "star": Case(STAR, 103, 4, None, None, 2, 4),
        "apb": Case(APB, 103, 4, 9, 6, 2, 4),
        "apb, all pass": Case(APB, 103, 4, 9, ALL, 1, 7),
    }


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_rows(case: Case, split: SequenceSplit) -> torch.Tensor:
    """[q_heads + 2 kv_heads, rows, d]: the prompt, then, of APB's later ranks, their anchor."""
    copied = split.question_at is not None
    extra = split.question_tokens + split.anchor_tokens if copied else 0
    return random(case.q_heads + 2 * case.kv_heads, split.num_tokens + extra, HEAD_DIM, seed=7)


def rows_of(split: SequenceSplit, rank: int) -> torch.Tensor:
    """Where a rank's rows are in ``all_rows``."""
    ranges = split.computed(rank)
    if split.copies_question(rank):
        anchor = split.num_tokens + split.question_tokens + split.anchor_tokens
        ranges[:3] = [(split.num_tokens, anchor)]
    return torch.cat([torch.arange(start, end) for start, end in ranges])


def visible(case: Case, split: SequenceSplit, method: BaselineMethod) -> torch.Tensor:
    """[q_heads, rows, rows] bool: the method, written down pair by pair."""
    q, k, _ = all_rows(case, split).split([case.q_heads, case.kv_heads, case.kv_heads])
    n = split.num_tokens
    anchor = split.anchor_tokens
    context = split.context_tokens
    rows = q.shape[1]
    seen = torch.zeros(case.q_heads, rows, rows, dtype=torch.bool)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    seen[:, :anchor, :anchor] = causal[:anchor, :anchor]
    seen[:, context:n, :n] = causal[context:n, :n]
    seen[:, n:, n:] = causal[n:, n:]  # the anchor with the copy
    spans = [split.block(index) for index in range(split.num_blocks)]
    for index, (start, end) in enumerate(spans):
        seen[:, start:end, start:end] = causal[: end - start, : end - start]
        if split.question_at is not None and index:
            seen[:, start:end, n:] = True
        else:
            seen[:, start:end, :anchor] = True
    for head in range(case.kv_heads):
        group = slice(head * case.ratio, (head + 1) * case.ratio)
        dots = torch.einsum("hqd,kd->hqk", q[group, context:n], k[head]).flatten(0, 1)
        own = dots.mean(0) if method.score is PassingScore.MEAN else dots.max(0).values
        for index, (start, end) in enumerate(spans):
            pooled = [max(own[max(start, t - 2) : min(end, t + 3)]) for t in range(start, end)]
            order = sorted(range(start, end), key=lambda t: (-pooled[t - start], -own[t]))
            for t in order[: method.passing_tokens]:
                for later, stop in spans[index + 1 :]:
                    seen[group, later:stop, t] = True
    return seen


def emulate(case: Case, split: SequenceSplit, seen: torch.Tensor) -> torch.Tensor:
    """[q_heads, rows, head_dim]."""
    q, k, v = all_rows(case, split).split([case.q_heads, case.kv_heads, case.kv_heads])
    k, v = (x.repeat_interleave(case.ratio, 0) for x in (k, v))
    return (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def dense(case: Case, split: SequenceSplit) -> torch.Tensor:
    seen = torch.ones(split.num_tokens, split.num_tokens, dtype=torch.bool).tril()
    whole = all_rows(case, split)[:, : split.num_tokens]
    q, k, v = whole.split([case.q_heads, case.kv_heads, case.kv_heads])
    k, v = (x.repeat_interleave(case.ratio, 0) for x in (k, v))
    return (q @ k.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1) @ v
