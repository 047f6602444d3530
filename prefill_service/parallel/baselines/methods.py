"""The comparison modes by name."""

from __future__ import annotations

from prefill_service.parallel.baselines.apb import apb
from prefill_service.parallel.baselines.method import BaselineMethod, Comparison
from prefill_service.parallel.baselines.spava import spava
from prefill_service.parallel.baselines.star import star


def baseline_method(
    method: Comparison,
    context_tokens: int,
    ranks: int,
    anchor_tokens: int | None = None,
    passing_tokens: int | None = None,
) -> BaselineMethod:
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
