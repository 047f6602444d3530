"""Text for a vLLM that streams token ids only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.detokenizer import Detokenizer, load_tokenizer

TEXT = "Grün ist 青い, and a 🦊 jumps."


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[..., Path]) -> Tokenizer:
    return load_tokenizer(str(checkpoint("qwen3_vl")))


def pieces(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], str]:
    """What each token gives, and the rest."""
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("Say:").ids, stop)
    return [detokenizer.add([token_id]) for token_id in token_ids], detokenizer.finish()


def test_checkpoint_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.reason is Reason.MODEL_INVALID
    assert str(tmp_path) in str(caught.value)


def test_pieces_are_whole_characters_and_make_the_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT).ids
    assert len(token_ids) > len(TEXT)  # some characters take several tokens
    parts, rest = pieces(tokenizer, token_ids)
    assert "".join(parts) == TEXT
    assert rest == ""
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    parts, rest = pieces(tokenizer, [*tokenizer.encode("yes").ids, end])
    assert "".join(parts) + rest == "yes"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_string_ends_the_text(tokenizer: Tokenizer, size: int) -> None:
    """However many tokens come at a time, nothing of the stop string is sent."""
    token_ids = tokenizer.encode(TEXT).ids
    detokenizer = Detokenizer(tokenizer, [], ["a 🦊", "and", "never"])
    parts = []
    for begin in range(0, len(token_ids), size):
        parts.append(detokenizer.add(token_ids[begin : begin + size]))
        assert TEXT.startswith("".join(parts))
    parts.append(detokenizer.finish())
    assert "".join(parts) == "Grün ist 青い, "


def test_what_could_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, [], ["END"])
    assert detokenizer.add(tokenizer.encode("abcEN").ids) == "abc"
    assert detokenizer.finish() == "EN"
