"""What distinguishes the published approximations: a few numbers and a rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TILE = 128
"""Published lengths are rounded up to multiples of it."""


class Comparison(StrEnum):
    """The published methods."""

    SPAVA = "spava"
    STAR = "star"
    APB = "apb"


class PassingScore(StrEnum):
    """How a key's claim to a place in its block's passing set is measured, per KV head.

    All are of raw dot products of keys with the question's queries, after rotary embedding, without
    scale or softmax; ``passing.choose`` then takes the maximum over neighbouring keys.
    """

    MEAN = "mean"
    """Over the question's tokens and the heads of the GQA group (Spava)."""
    MAX = "max"
    """Over the same."""


@dataclass(frozen=True, slots=True)
class BaselineMethod:
    """One published method with its lengths for one prompt.

    Attributes:
        method: which.
        anchor_tokens: first tokens of the prompt, which every rank has and every block sees.
        passing_tokens: keys per KV head that a block passes on to all later blocks.
        score: chooses them.
        blocks_per_rank: 2: 2P blocks, of which rank r has r and 2P-1-r; 1: P blocks.
        question_in_anchor: ranks after the first have a copy of the question in their anchor.

    Raises:
        ValueError: negative lengths, other numbers of blocks, or two blocks a rank where there are
            copies: the first rank, which has none, would have the last block too.
    """

    method: Comparison
    anchor_tokens: int
    passing_tokens: int
    score: PassingScore = PassingScore.MEAN
    blocks_per_rank: int = 2
    question_in_anchor: bool = False

    def __post_init__(self) -> None:
        if self.anchor_tokens < 0 or self.passing_tokens < 0:
            raise ValueError(
                f"an anchor of {self.anchor_tokens} and {self.passing_tokens} passing tokens: "
                "neither may be negative"
            )
        if self.blocks_per_rank not in (1, 2):
            raise ValueError(f"{self.blocks_per_rank} blocks per rank; there are 1 or 2")
        if self.question_in_anchor and self.blocks_per_rank != 1:
            raise ValueError("a question in the anchor needs one block per rank, not 2")

    def num_blocks(self, ranks: int) -> int:
        """Blocks of the prompt. One rank passes nothing on, so there one block is the whole."""
        return 1 if ranks == 1 else ranks * self.blocks_per_rank


def tiles(tokens: int) -> int:
    """``tokens`` rounded up to whole tiles."""
    return -(-tokens // TILE) * TILE
