"""The published split of a prompt, to the token; the product cuts between temporal patches."""

from __future__ import annotations

from prefill_service.parallel.baselines.methods import BaselineMethod
from prefill_service.parallel.baselines.sequence_split import SequenceSplit


def split_evenly(
    context_tokens: int,
    question_tokens: int,
    ranks: int,
    method: BaselineMethod,
    *,
    text_tokens: int = 0,
) -> SequenceSplit:
    """Blocks as even as possible; the first ones take a token more, having least to attend to.

    Args:
        context_tokens: the prompt without the question.
        question_tokens: at its end.
        ranks: of the group.
        method: gives the anchor and the number of blocks.
        text_tokens: text at the beginning; a copy of the question comes after it.

    Raises:
        ValueError: the context has no token for some block, or the question none.
    """
    blocks = method.num_blocks(ranks)
    anchor = method.anchor_tokens
    if context_tokens < anchor + blocks:
        raise ValueError(
            f"a context of {context_tokens} tokens is too short for {method.name} on {ranks} "
            f"ranks: an anchor of {anchor} and {blocks} blocks need at least {anchor + blocks}"
        )
    each, more = divmod(context_tokens - anchor, blocks)
    ends = [anchor + index * each + min(index, more) for index in range(1, blocks + 1)]
    at = min(text_tokens, anchor) if method.question_in_anchor else None
    return SequenceSplit(
        ranks=ranks,
        anchor_tokens=anchor,
        block_ends=tuple(ends),
        question_tokens=question_tokens,
        question_at=at,
    )
