"""Chats as the family's own template renders them, with the video ahead of the first question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.families.base import Family

Messages = Sequence[tuple[str, str]]
"""(role, text) in turn; role is "user" or "assistant", first and last "user"."""

_PIECE = 1 << 14
"""Characters that are tokenized at once when tokens are counted."""

_PARTED = 8
"""Tokens that a cut of a text may add."""


class Chat:
    """Renders and tokenizes chats about one video.

    Args:
        processor: the checkpoint's, with tokenizer and chat template.
        family: of the checkpoint; it says which special tokens are the user's.
    """

    def __init__(self, processor: Any, family: Family) -> None:
        self._processor = processor
        added = processor.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= {*processor.tokenizer.all_special_tokens, processor.video_token}
        self._control_tokens = sorted(special - family.grounding_tokens)

    def check_template(self) -> None:
        """Render a chat of two questions, as requests will.

        Raises:
            ServiceError: MODEL_INVALID for a checkpoint without a chat template, and for one that
                cannot be rendered or does not put a video ahead of the first question.
        """
        processor = self._processor
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise _template_error(
                "is missing: neither chat_template.jinja, chat_template.json nor "
                "tokenizer_config.json has one. Copy it from the model that this one was made of"
            )
        chat = [("user", "?"), ("assistant", "!"), ("user", "?")]
        try:
            text = self.render("", chat[:1], add_generation_prompt=False)
            videos = text.count(processor.video_token)
            if videos != 1 or "?" not in text[text.index(processor.video_token) :]:
                raise _template_error(
                    f"makes {text!r} of a question with a video; expected one "
                    f"{processor.video_token} ahead of the question"
                )
            self.suffix_ids("", chat)
        except ServiceError:
            raise
        except Exception as error:  # jinja's, or what the template raises
            raise _template_error(f"cannot be rendered: {error}") from error

    def prefix(self, system_prompt: str) -> str:
        """The rendered text up to the question: it ends with what closes the video."""
        marker = "?"
        text = self.render(system_prompt, [("user", marker)], add_generation_prompt=False)
        end = text.rfind(self._processor.video_token)
        # What closes the placeholder, as Qwen's <|vision_end|>, belongs to the prefix.
        return text[: text.index(marker, end)]

    def suffix_ids(self, system_prompt: str, messages: Messages) -> list[int]:
        """Token ids of everything after the prefix, ready for the answer.

        Raises:
            ServiceError: QUESTION_EMPTY, or INVALID_REQUEST for roles out of turn and for texts
                that contain the model's control tokens; MODEL_INVALID for a template that does not
                begin with the prefix.
        """
        self._check_messages(messages)
        prefix = self.prefix(system_prompt)
        text = self.render(system_prompt, messages, add_generation_prompt=True)
        if not text.startswith(prefix):
            raise _template_error("does not begin every chat with the video in the same way")
        suffix = self._processor.tokenizer(text[len(prefix) :], add_special_tokens=False)
        ids: list[int] = suffix["input_ids"]
        return ids

    def count_tokens(self, texts: Sequence[str], most: int) -> int:
        """About how many tokens texts make; the counting ends when they are more than ``most``.

        They are tokenized in pieces. Each cut may part a token in a few.
        """
        tokens = 0
        for text in texts:
            for start in range(0, len(text), _PIECE):
                piece = text[start : start + _PIECE]
                encoded = self._processor.tokenizer(piece, add_special_tokens=False)
                tokens += max(0, len(encoded["input_ids"]) - _PARTED)
                if tokens > most:
                    return tokens
        return tokens

    def render(self, system_prompt: str, messages: Messages, add_generation_prompt: bool) -> str:
        """The chat as text, the video before the first message's.

        Raises:
            ServiceError: INVALID_REQUEST for a system prompt with the model's control tokens.
        """
        chat: list[dict[str, Any]] = []
        if system_prompt:
            self._check_text("the system prompt", system_prompt)
            chat.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
        for i, (role, text) in enumerate(messages):
            content: list[dict[str, str]] = [{"type": "text", "text": text}]
            if i == 0:
                content.insert(0, {"type": "video"})
            chat.append({"role": role, "content": content})
        rendered = self._processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(rendered)

    def _check_messages(self, messages: Messages) -> None:
        if not messages:
            raise ServiceError(Reason.QUESTION_EMPTY, "there is no question")
        for i, (role, text) in enumerate(messages):
            expected = ("user", "assistant")[i % 2]
            if role != expected:
                raise ServiceError(
                    Reason.INVALID_REQUEST,
                    f"message {i} has role {role!r}; user and assistant take turns, user first",
                    message_index=i,
                )
            if not text.strip():
                raise ServiceError(
                    Reason.QUESTION_EMPTY, f"message {i} has no text", message_index=i
                )
            self._check_text(f"message {i}", text)
        if messages[-1][0] != "user":
            raise ServiceError(Reason.INVALID_REQUEST, "the last message must be the user's")

    def _check_text(self, name: str, text: str) -> None:
        """Refuse control tokens in text from outside: they would forge turns or video spans."""
        for token in self._control_tokens:
            if token in text:
                raise ServiceError(
                    Reason.INVALID_REQUEST,
                    f"{name} contains the control token {token!r}, which would forge a turn or a "
                    "video; text may contain all tokens but the model's control tokens",
                    token=token,
                )


def _template_error(text: str) -> ServiceError:
    return ServiceError(
        Reason.MODEL_INVALID, f"the chat template {text}", file="chat_template.jinja"
    )
