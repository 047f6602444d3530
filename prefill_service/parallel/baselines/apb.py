"""APB (arXiv 2502.12085, ACL 2025), which Spava builds on."""

from __future__ import annotations

from prefill_service.parallel.baselines.method import (
    BaselineMethod,
    Comparison,
    PassingScore,
    tiles,
)


def apb(
    context_tokens: int, anchor_tokens: int | None = None, passing_tokens: int | None = None
) -> BaselineMethod:
    """One block per rank behind an anchor; but for the first, with a copy of the question in it.

    Published APB chooses what to pass with retaining heads (Locret, arXiv 2410.01805): small MLPs
    on a token's own Q, K and V, trained per model. None are public for the models served here.
    What stands in is the quantity they are trained to predict, with the question's queries in place
    of the answer's: a key's largest raw dot product with any of them, over tokens and GQA group. It
    knows the question, which trained heads only know through the anchor, so it flatters APB.

    The copy stands after the text that begins the prompt (published: after 16 tokens) at the
    positions that follow. It comes on top of the anchor, whose tokens keep their own positions;
    published, it pushes as many of them out and the others on.

    Args:
        context_tokens: the prompt without the question.
        anchor_tokens: as the Spava paper runs it on video: a 64th of the context, in whole tiles.
        passing_tokens: the same.
    """
    published = tiles(context_tokens // 64)
    return BaselineMethod(
        Comparison.APB,
        published if anchor_tokens is None else anchor_tokens,
        published if passing_tokens is None else passing_tokens,
        PassingScore.MAX,
        blocks_per_rank=1,
        question_in_anchor=True,
    )
