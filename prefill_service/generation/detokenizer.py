"""Text of an answer's tokens, for a vLLM that streams token ids only (before 0.32)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefill_service.compat import VLLM_ANSWERS_TEXT
from prefill_service.errors import Reason, ServiceError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream

_INVALID_PREFIX = "Invalid prefix encountered"  # of tokenizers' decode stream


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a checkpoint, from its ``tokenizer.json``.

    Args:
        model: folder or hub id.

    Raises:
        ServiceError: MODEL_INVALID if it cannot be read.
    """
    from tokenizers import Tokenizer

    folder = Path(model)
    try:
        if folder.is_dir():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Tokenizer.from_pretrained(model)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ServiceError(
            Reason.MODEL_INVALID,
            f"{model!r} has no tokenizer.json that can be read, and vLLM {VLLM_ANSWERS_TEXT} "
            f"alone sends an answer's text: {error}",
            model=model,
        ) from error


class Detokenizer:
    """Text that grows with one answer; as vLLM's ``FastIncrementalDetokenizer`` makes it.

    Special tokens have no text. A stop string and what follows it are left out, and so the last
    characters are held back while they could be the beginning of one.

    Args:
        tokenizer: the model's.
        prompt: token ids before the answer; the first piece may depend on them.
        stop: strings at which the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stream = self._new_stream(list(prompt))
        self._stop = tuple(stop)
        self._held = max((len(text) for text in stop), default=1) - 1
        self._text = ""
        self._sent = 0
        self._stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """Text that the tokens add and that no stop string can take back."""
        for token_id in token_ids:
            if not self._stopped:
                piece = self._step(token_id)
                self._text += piece
                self._cut_at_stop(len(piece))
        return self._send(len(self._text) if self._stopped else len(self._text) - self._held)

    def finish(self) -> str:
        """Text that was held back; the answer has ended."""
        return self._send(len(self._text))

    def _send(self, end: int) -> str:
        begin = self._sent
        self._sent = max(begin, end)
        return self._text[begin : self._sent]

    def _cut_at_stop(self, new_characters: int) -> None:
        """Drop everything from the stop string that ends first, if one ends in the new text."""
        begin = len(self._text) - new_characters
        found = []
        for stop in self._stop:
            place = self._text.find(stop, max(0, begin - len(stop) + 1))
            if place >= 0:
                found.append((place + len(stop), place))
        if found:
            self._text = self._text[: min(found)[1]]
            self._stopped = True

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            # Bytes that are no UTF-8 confuse the stream; vLLM starts a new one, too.
            self._stream = self._new_stream([])
            return self._stream.step(self._tokenizer, token_id) or ""

    def _new_stream(self, prompt: list[int]) -> DecodeStream:
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=prompt, skip_special_tokens=True)
