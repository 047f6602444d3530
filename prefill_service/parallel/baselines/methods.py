"""The published approximate methods: what distinguishes them is a few numbers and a rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

TILE = 128
"""Published lengths are rounded up to multiples of it."""


class BaselineName(StrEnum):
    """The names of the published methods."""

    SPAVA = "spava"
    STAR = "star"
    APB = "apb"


class PassingScore(StrEnum):
    """How a key's score for its block's passing set is computed, per KV head.

    All are of raw dot products of keys with the question's queries, after rotary embedding, without
    scale or softmax; ``passing.choose_keys`` then takes the maximum over neighbouring keys.
    """

    MEAN = "mean"
    """The mean over the question's tokens and the query heads of the KV head (Spava)."""
    MAX = "max"
    """The largest, over the same (APB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineMethod:
    """One published method with its lengths for one prompt.

    Attributes:
        name: which it is.
        anchor_tokens: first tokens of the prompt, which every rank has and every block sees.
        passing_tokens: keys per KV head that a block passes on to all later blocks.
        score: chooses them.
        blocks_per_rank: 2: 2P blocks, of which rank r has r and 2P-1-r; 1: P blocks.
        question_in_anchor: ranks after the first have a copy of the question in their anchor.

    Raises:
        ValueError: negative lengths, other numbers of blocks, or two blocks a rank where there are
            copies: the first rank, which has none, would have the last block too.
    """

    name: BaselineName
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


def baseline_method(
    name: BaselineName,
    context_tokens: int,
    ranks: int,
    *,
    anchor_tokens: int | None = None,
    passing_tokens: int | None = None,
) -> BaselineMethod:
    """A published method on one prompt.

    Args:
        name: which.
        context_tokens: the prompt without the question.
        ranks: of the group.
        anchor_tokens, passing_tokens: ``None``: as published.

    Raises:
        ValueError: passing tokens for ``star``, which passes nothing, or negative lengths.
    """
    match name:
        case BaselineName.SPAVA:
            return spava(context_tokens, anchor_tokens, passing_tokens)
        case BaselineName.APB:
            return apb(context_tokens, anchor_tokens, passing_tokens)
        case BaselineName.STAR:
            if passing_tokens:
                raise ValueError(f"star passes no tokens on, {passing_tokens} were asked for")
            return star(context_tokens, ranks, anchor_tokens)


def spava(
    context_tokens: int, anchor_tokens: int | None = None, passing_tokens: int | None = None
) -> BaselineMethod:
    """Spava (arXiv 2601.21444, ACL 2026), called APB-V in its released code.

    Two blocks per rank in zigzag order; what the question points at is passed on.

    Of the released code this does not copy: question rows that miss the last keys of other ranks
    (a causal mask aligned to keys without the question); max-pooling across the seam between a
    rank's two blocks, which are no neighbours; passing sets cut to a multiple of 128, which leaves
    short videos without any; blocks of one length but the last, which may then be empty.

    Args:
        context_tokens: the prompt without the question.
        anchor_tokens: published: a 64th of the context, in whole tiles.
        passing_tokens: published: a 128th, in whole tiles.
    """
    return BaselineMethod(
        name=BaselineName.SPAVA,
        anchor_tokens=_default(anchor_tokens, round_up_to_tiles(context_tokens // 64)),
        passing_tokens=_default(passing_tokens, round_up_to_tiles(context_tokens // 128)),
        score=PassingScore.MEAN,
    )


def star(context_tokens: int, ranks: int, anchor_tokens: int | None = None) -> BaselineMethod:
    """Star Attention (arXiv 2411.17116): phase 1 on the context, phase 2 on the question.

    One block per rank behind an anchor as long as a block; nothing is passed on.

    The published first block is the anchor and keeps one host to itself. Here every rank has a
    block besides the anchor, so a context makes ranks + 1 blocks of the published kind.

    Args:
        context_tokens: the prompt without the question.
        ranks: of the group.
        anchor_tokens: published: a block's length.
    """
    block = -(-context_tokens // (ranks + 1))
    anchor = block if anchor_tokens is None else anchor_tokens
    return BaselineMethod(
        name=BaselineName.STAR, anchor_tokens=anchor, passing_tokens=0, blocks_per_rank=1
    )


def apb(
    context_tokens: int, anchor_tokens: int | None = None, passing_tokens: int | None = None
) -> BaselineMethod:
    """APB (arXiv 2502.12085, ACL 2025), which Spava builds on.

    One block per rank behind an anchor; but for the first, with a copy of the question in it.

    Published APB chooses what to pass with retaining heads (Locret, arXiv 2410.01805): small MLPs
    on a token's own Q, K and V, trained per model. None are public for the models served here.
    What stands in is the quantity they are trained to predict, with the question's queries in place
    of the answer's: a key's largest raw dot product with any of them, over its tokens and the query
    heads of the KV head. It knows the question, which trained heads only know through the anchor,
    so it flatters APB.

    The copy stands after the text that begins the prompt (published: after 16 tokens) at the
    positions that follow. It comes on top of the anchor, whose tokens keep their own positions;
    published, it pushes as many of them out and the others on.

    Args:
        context_tokens: the prompt without the question.
        anchor_tokens: as the Spava paper runs it on video: a 64th of the context, in whole tiles.
        passing_tokens: the same.
    """
    published = round_up_to_tiles(context_tokens // 64)
    return BaselineMethod(
        name=BaselineName.APB,
        anchor_tokens=_default(anchor_tokens, published),
        passing_tokens=_default(passing_tokens, published),
        score=PassingScore.MAX,
        blocks_per_rank=1,
        question_in_anchor=True,
    )


def round_up_to_tiles(tokens: int) -> int:
    """``tokens`` rounded up to whole tiles."""
    return -(-tokens // TILE) * TILE


def _default(given: int | None, published: int) -> int:
    return published if given is None else given
