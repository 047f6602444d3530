"""What happens in the demo's video, and what is asked of it."""

from __future__ import annotations

from tools.needle.stories import (
    Needle,
    Question,
    Story,
    color_question,
    count_question,
    order_question,
)

FPS = 10
SEED = 7
"""Of the background, and of the needles' places and sizes."""

_STAR = Needle("star", "yellow", (37, 118, 203))
_CIRCLE = Needle("circle", "red", (62,))
_TRIANGLE = Needle("triangle", "blue", (150,))
_RING = Needle("ring", "cyan", (176,))

STORY = Story(240, (_STAR, _CIRCLE, _TRIANGLE, _RING), countable=1)
"""Four minutes of background; of six seconds of it each shows a shape."""

QUESTIONS: tuple[Question, ...] = (
    color_question(_TRIANGLE),
    order_question(_RING, _CIRCLE),
    count_question(_STAR),
)


def is_right(question: Question, text: str) -> bool:
    """Whether an answer is the truth, word for word."""
    return text.strip() == question.answer


def marked(question: Question, text: str) -> str:
    """An answer for the table: what is wrong says so."""
    return text.strip() + ("" if is_right(question, text) else " (wrong)")
