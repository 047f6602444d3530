"""Spava, called APB-V in its released code (arXiv 2601.21444, ACL 2026)."""

from __future__ import annotations

from prefill_service.parallel.baselines.method import (
    BaselineMethod,
    Comparison,
    PassingScore,
    tiles,
)


def spava(
    context_tokens: int, anchor_tokens: int | None = None, passing_tokens: int | None = None
) -> BaselineMethod:
    """Two blocks per rank in zigzag order; what the question points at is passed on.

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
        Comparison.SPAVA,
        tiles(context_tokens // 64) if anchor_tokens is None else anchor_tokens,
        tiles(context_tokens // 128) if passing_tokens is None else passing_tokens,
        PassingScore.MEAN,
    )
