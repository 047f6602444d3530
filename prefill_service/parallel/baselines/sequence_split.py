"""How a prompt is split: an anchor and the question on every rank, blocks of the rest to each.

    [anchor | block 0 | block 1 | ... | question]

A rank's rows of a layer are [anchor | its blocks | question]; with APB, ranks after the first have
a copy of the question in their anchor.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prefill_service.parallel.baselines.methods import BaselineMethod
from prefill_service.parallel.token_layout import Range


@dataclass(frozen=True, slots=True)
class RankRows:
    """Where a rank's rows are.

    Attributes:
        anchor: the anchor, with the copy of the question if the rank has one.
        blocks: each of the rank's blocks.
        question: the question.
    """

    anchor: slice
    blocks: tuple[slice, ...]
    question: slice

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self.question.stop)


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """A prompt, split over ranks.

    Attributes:
        ranks: of the group.
        anchor_tokens: first tokens of the prompt.
        block_ends: one past each block's last token; the first begins at the anchor's end.
        question_tokens: last tokens of the prompt.
        question_at: anchor tokens before the copy of the question; ``None``: no rank has one.

    Raises:
        ValueError: an empty block or question, blocks that do not come out even over the ranks, or
            a copy outside the anchor.
    """

    ranks: int
    anchor_tokens: int
    block_ends: tuple[int, ...]
    question_tokens: int
    question_at: int | None = None

    def __post_init__(self) -> None:
        if self.question_tokens < 1:
            raise ValueError(f"a question of {self.question_tokens} tokens; at least 1 is needed")
        if self.num_blocks not in (self.ranks, 2 * self.ranks):
            raise ValueError(f"{self.num_blocks} blocks are neither 1 nor 2 for {self.ranks} ranks")
        if self.question_at is not None and not 0 <= self.question_at <= self.anchor_tokens:
            raise ValueError(
                f"a copy of the question after {self.question_at} tokens is outside an anchor of "
                f"{self.anchor_tokens}"
            )
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
        """Tokens of the whole prompt."""
        return self.context_tokens + self.question_tokens

    def block(self, index: int) -> Range:
        """Tokens of a block."""
        return (self.block_ends[index - 1] if index else self.anchor_tokens), self.block_ends[index]

    def blocks_of(self, rank: int) -> tuple[int, ...]:
        """A rank's blocks, ascending: r and 2P-1-r, so that all ranks attend equally much."""
        mirrored = 2 * self.ranks - 1 - rank
        return (rank,) if self.num_blocks == self.ranks else (rank, mirrored)

    def anchor_slice(self, rank: int) -> Range:
        """Tokens of the anchor whose KV the rank keeps; each is kept by one rank.

        Rows of an anchor with a copy of the question depend on it, so the first rank's are kept.
        """
        if self.question_at is not None:
            return (0, self.anchor_tokens) if rank == 0 else (0, 0)
        start, end = (self.anchor_tokens * index // self.ranks for index in (rank, rank + 1))
        return start, end

    def held(self, rank: int) -> list[Range]:
        """Tokens whose KV the rank keeps, ascending: each token of the prompt on one rank."""
        ranges = [self.anchor_slice(rank), *(self.block(index) for index in self.blocks_of(rank))]
        if rank == 0:
            ranges.append((self.context_tokens, self.num_tokens))
        return [(start, end) for start, end in ranges if end > start]

    def held_rows(self, rank: int) -> list[slice]:
        """Where ``held`` is among the rank's rows."""
        rows = self.rank_rows(rank)
        anchor = [rows.anchor.start + token for token in self.anchor_slice(rank)]
        parts = [slice(*anchor), *rows.blocks, *([rows.question] if rank == 0 else [])]
        return [part for part in parts if part.stop > part.start]

    def computed(self, rank: int) -> list[Range]:
        """Tokens of the rank's rows, in the rows' order."""
        question = (self.context_tokens, self.num_tokens)
        blocks = [self.block(index) for index in self.blocks_of(rank)]
        anchor = [(0, self.anchor_tokens)]
        if self.copies_question(rank):
            assert self.question_at is not None
            anchor = [(0, self.question_at), question, (self.question_at, self.anchor_tokens)]
        return [*anchor, *blocks, question]

    def copies_question(self, rank: int) -> bool:
        """Whether the rank has a copy of the question in its anchor."""
        return self.question_at is not None and rank > 0

    def rank_rows(self, rank: int) -> RankRows:
        """Where the rank's rows are."""
        copied = self.question_tokens if self.copies_question(rank) else 0
        ends = [self.anchor_tokens + copied]
        for start, end in map(self.block, self.blocks_of(rank)):
            ends.append(ends[-1] + end - start)
        blocks = tuple(slice(start, end) for start, end in pairwise(ends))
        question = slice(ends[-1], ends[-1] + self.question_tokens)
        return RankRows(anchor=slice(0, ends[0]), blocks=blocks, question=question)


def split_patches(
    patch_ends: Sequence[int] | np.ndarray,
    question_tokens: int,
    ranks: int,
    method: BaselineMethod,
    *,
    text_tokens: int = 0,
) -> SequenceSplit:
    """Blocks of whole temporal patches, as even as possible, because a rank encodes whole ones.

    The first blocks take a patch more, having least to attend to. The anchor ends with the patch
    that the published length ends in.

    Args:
        patch_ends: [patches] one past each patch's last token, ascending.
        question_tokens: after the last of them.
        ranks: of the group.
        method: gives the anchor and the number of blocks.
        text_tokens: text at the beginning; a copy of the question comes after it.

    Raises:
        ValueError: fewer patches after the anchor than blocks, or no question.
    """
    blocks = method.num_blocks(ranks)
    anchor = method.anchor_tokens
    ends = [int(end) for end in patch_ends]
    taken = bisect_left(ends, anchor) + 1 if anchor else 0
    left = max(0, len(ends) - taken)
    if left < blocks:
        raise ValueError(
            f"a video of {len(ends)} temporal patches is too short for {method.name} on {ranks} "
            f"ranks: an anchor of {anchor} tokens leaves {left}, {blocks} blocks need as many"
        )
    each, more = divmod(left, blocks)
    cuts = [taken + index * each + min(index, more) for index in range(1, blocks + 1)]
    whole = ends[taken - 1] if taken else 0
    at = min(text_tokens, whole) if method.question_in_anchor else None
    return SequenceSplit(
        ranks=ranks,
        anchor_tokens=whole,
        block_ends=tuple(ends[cut - 1] for cut in cuts),
        question_tokens=question_tokens,
        question_at=at,
    )
