"""The comparison modes by name."""

from __future__ import annotations

from prefill_service.parallel.comparison.apb import apb
from prefill_service.parallel.comparison.mode import Comparison, ComparisonMode
from prefill_service.parallel.comparison.spava import spava
from prefill_service.parallel.comparison.star import star


def comparison_mode(
    method: Comparison,
    context_tokens: int,
    ranks: int,
    anchor_tokens: int | None = None,
    passing_tokens: int | None = None,
) -> ComparisonMode:
    """A published method on one prompt.

    Args:
        method: which.
        context_tokens: the prompt without the question.
        ranks: of the group.
        anchor_tokens, passing_tokens: ``None``: as published.

    Raises:
        ValueError: passing tokens for ``star``, which passes nothing, or negative lengths.
    """
    match method:
        case Comparison.SPAVA:
            return spava(context_tokens, anchor_tokens, passing_tokens)
        case Comparison.APB:
            return apb(context_tokens, anchor_tokens, passing_tokens)
        case Comparison.STAR:
            if passing_tokens:
                raise ValueError(f"star passes no tokens on, {passing_tokens} were asked for")
            return star(context_tokens, ranks, anchor_tokens)
