"""Star Attention (arXiv 2411.17116): its first phase on context, its second on the question."""

from __future__ import annotations

from prefill_service.parallel.baselines.method import BaselineMethod, Comparison


def star(context_tokens: int, ranks: int, anchor_tokens: int | None = None) -> BaselineMethod:
    """One block per rank behind an anchor as long as a block; nothing is passed on.

    The published first block is the anchor and keeps one host to itself. Here every rank has a
    block besides the anchor, so a context makes ranks + 1 blocks of the published kind.

    Args:
        context_tokens: the prompt without the question.
        ranks: of the group.
        anchor_tokens: published: a block's length.
    """
    block = -(-context_tokens // (ranks + 1))
    anchor = block if anchor_tokens is None else anchor_tokens
    return BaselineMethod(Comparison.STAR, anchor, 0, blocks_per_rank=1)
