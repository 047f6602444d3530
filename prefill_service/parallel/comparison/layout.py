"""How a prompt is split: an anchor and the question on every rank, blocks of the rest to each.

    [anchor | block 0 | block 1 | ... | question]

A rank's rows of a layer are [copy of the question, APB only | anchor | its blocks | question].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from prefill_service.parallel.comparison.mode import ComparisonMode
from prefill_service.parallel.layout import Range


@dataclass(frozen=True, slots=True)
class RankRows:
    """Where a rank's rows are.

    Attributes:
        lead: rows of the copy of the question.
        prefix: that copy and the anchor, which all blocks of the rank see.
        blocks: each of the rank's blocks.
        question: the question.
    """

    lead: slice
    prefix: slice
    blocks: tuple[slice, ...]
    question: slice

    @property
    def anchor(self) -> slice:
        """The anchor alone."""
        return slice(self.lead.stop, self.prefix.stop)

    @property
    def count(self) -> int:
        """All rows."""
        return int(self.question.stop)


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """A prompt, split over ranks.

    Attributes:
        ranks: of the group.
        anchor_tokens: first tokens of the prompt.
        block_ends: one past each block's last token; the first begins at the anchor's end.
        question_tokens: last tokens of the prompt.
        question_leads: see ``ComparisonMode``.

    Raises:
        ValueError: an empty block or question, or blocks that do not come out even over the ranks.
    """

    ranks: int
    anchor_tokens: int
    block_ends: tuple[int, ...]
    question_tokens: int
    question_leads: bool = False

    def __post_init__(self) -> None:
        if self.question_tokens < 1:
            raise ValueError(f"a question of {self.question_tokens} tokens; at least 1 is needed")
        if self.num_blocks not in (self.ranks, 2 * self.ranks):
            raise ValueError(f"{self.num_blocks} blocks are neither 1 nor 2 for {self.ranks} ranks")
        for start, end in pairwise((self.anchor_tokens, *self.block_ends)):
            if end <= start:
                raise ValueError(f"a block of tokens {start} to {end} is empty")

    @property
    def num_blocks(self) -> int:
        """Blocks over all ranks."""
        return len(self.block_ends)

    @property
    def context_tokens(self) -> int:
        """The prompt without the question."""
        return self.block_ends[-1]

    @property
    def num_tokens(self) -> int:
        """The prompt."""
        return self.context_tokens + self.question_tokens

    def block(self, index: int) -> Range:
        """Tokens of a block."""
        return (self.block_ends[index - 1] if index else self.anchor_tokens), self.block_ends[index]

    def blocks_of(self, rank: int) -> tuple[int, ...]:
        """A rank's blocks, ascending: r and 2P-1-r, so that all ranks attend equally much."""
        mirrored = 2 * self.ranks - 1 - rank
        return (rank,) if self.num_blocks == self.ranks else (rank, mirrored)

    def anchor_slice(self, rank: int) -> Range:
        """Tokens of the anchor whose KV the rank answers for: each has one rank.

        Anchors that a question leads have seen it; the first rank's, which none leads, is the one
        that counts.
        """
        if self.question_leads:
            return (0, self.anchor_tokens) if rank == 0 else (0, 0)
        return self.anchor_tokens * rank // self.ranks, self.anchor_tokens * (
            rank + 1
        ) // self.ranks

    def held(self, rank: int) -> list[Range]:
        """Tokens whose KV the rank keeps, ascending: each token of the prompt on one rank."""
        ranges = [self.anchor_slice(rank), *(self.block(index) for index in self.blocks_of(rank))]
        if rank == 0:
            ranges.append((self.context_tokens, self.num_tokens))
        return [(start, end) for start, end in ranges if end > start]

    def computed(self, rank: int) -> list[Range]:
        """Tokens of the rank's rows, in the rows' order."""
        question = (self.context_tokens, self.num_tokens)
        blocks = [self.block(index) for index in self.blocks_of(rank)]
        lead = [question] if self.leads(rank) else []
        return [*lead, (0, self.anchor_tokens), *blocks, question]

    def leads(self, rank: int) -> bool:
        """Whether the rank has a copy of the question ahead of its anchor."""
        return self.question_leads and rank > 0

    def rows(self, rank: int) -> RankRows:
        """Where the rank's rows are."""
        ends = [0]
        for start, end in self.computed(rank):
            ends.append(ends[-1] + end - start)
        parts = [slice(start, end) for start, end in pairwise(ends)]
        lead = parts.pop(0) if self.leads(rank) else slice(0, 0)
        anchor, *blocks, question = parts
        return RankRows(lead, slice(0, anchor.stop), tuple(blocks), question)


def split_evenly(
    context_tokens: int, question_tokens: int, ranks: int, mode: ComparisonMode
) -> SequenceSplit:
    """Blocks as even as possible; the first ones take a token more, having least to attend to.

    Args:
        context_tokens: the prompt without the question.
        question_tokens: at its end.
        ranks: of the group.
        mode: gives the anchor and the number of blocks.

    Raises:
        ValueError: the context has no token for some block, or the question none.
    """
    blocks = mode.num_blocks(ranks)
    anchor = mode.anchor_tokens
    if context_tokens < anchor + blocks:
        raise ValueError(
            f"a context of {context_tokens} tokens is too short for {mode.method} on {ranks} "
            f"ranks: an anchor of {anchor} and {blocks} blocks need at least {anchor + blocks}"
        )
    each, more = divmod(context_tokens - anchor, blocks)
    ends = [anchor + index * each + min(index, more) for index in range(1, blocks + 1)]
    return SequenceSplit(ranks, anchor, tuple(ends), question_tokens, mode.question_leads)
