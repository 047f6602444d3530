"""A tokenizer for prompts in which one special token stands many thousand times in a row.

A processor writes a video as text, a placeholder for each vision token, and has all of it
tokenized. That costs 13 us a placeholder (measured), seconds for a long video, and nothing of it is
in doubt: special tokens are cut out of a text before anything else is done with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_KNOWN = frozenset({"input_ids", "attention_mask"})


class RunTokenizer:
    """Stands for a tokenizer, and tokenizes a run of one special token as though it were one.

    Everything else is the tokenizer's own, attributes too.

    Args:
        tokenizer: transformers'.
        token: the special token.
    """

    def __init__(self, tokenizer: Any, token: str) -> None:
        self._tokenizer = tokenizer
        self._token = token
        self._token_id = int(tokenizer.convert_tokens_to_ids(token))

    @classmethod
    def wrap(cls, tokenizer: Any, token: str) -> Any:
        """A tokenizer with fast runs, or the tokenizer itself if its runs may mean something.

        Args:
            tokenizer: transformers'.
            token: the token that stands in runs.
        """
        added = {entry.content: entry for entry in tokenizer.added_tokens_decoder.values()}
        entry = added.get(token)
        if entry is None or entry.lstrip or entry.rstrip or entry.single_word or entry.normalized:
            return tokenizer
        return cls(tokenizer, token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Tokenize, as the tokenizer does."""
        if isinstance(text, list) and len(text) == 1 and not kwargs.get("return_tensors"):
            encoded = self._tokenize_runs(text[0], kwargs)
            if encoded is not None:
                return encoded
        return self._tokenizer(text, **kwargs)

    def _tokenize_runs(self, text: str, kwargs: Mapping[str, Any]) -> Any:
        """The encoding of one text, or ``None`` if it has more to it than ids."""
        between = text.split(self._token)
        # Between two tokens of a run there is nothing.
        begins = [i for i in range(1, len(between)) if i == 1 or between[i - 1]]
        short = between[0] + "".join(
            self._token + between[end - 1] for end in [*begins[1:], len(between)][: len(begins)]
        )
        encoded = self._tokenizer([short], **kwargs)
        ids = np.asarray(encoded["input_ids"][0], np.int64)
        runs = np.flatnonzero(ids == self._token_id)
        if set(encoded) - _KNOWN or len(runs) != len(begins):
            return None
        counts = np.ones(len(ids), np.int64)
        counts[runs] = np.diff([*begins, len(between)])
        for name in encoded:
            encoded[name] = [np.repeat(np.asarray(encoded[name][0]), counts).tolist()]
        return encoded
