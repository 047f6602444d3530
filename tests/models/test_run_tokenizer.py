"""A run of special tokens is tokenized as the tokenizer itself does, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from prefill_service.models.family_registry import FAMILIES
from prefill_service.models.run_tokenizer import RunTokenizer

PAD = "<|video_pad|>"
TEXTS = [
    "",
    "no video",
    PAD,
    f"a{PAD}b",
    PAD * 3,
    f"{PAD * 2}a {PAD} {PAD * 5}",
    f"<0.5 seconds><|vision_start|>{PAD * 4}<|vision_end|><1.5 seconds><|vision_start|>{PAD * 4}",
    f"<|video_pad {PAD * 2}<|video_pad|",
]


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(checkpoint(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_tokenizers_own(tokenizer: Any, text: str) -> None:
    fast = RunTokenizer.wrap(tokenizer, PAD)
    assert fast is not tokenizer
    for kwargs in ({}, {"add_special_tokens": False}, {"return_token_type_ids": True}):
        wanted = tokenizer([text], **kwargs)
        found = fast([text], **kwargs)
        assert dict(found) == dict(wanted)
    assert fast(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_tokenizer_sees_a_run_once(tokenizer: Any) -> None:
    seen: list[str] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            seen.extend(texts)
            return tokenizer(texts, **kwargs)

    found = RunTokenizer.wrap(Spy(), PAD)([f"a{PAD * 1000}b"])
    assert seen == [f"a{PAD}b"]
    assert len(found["input_ids"][0]) == len(tokenizer("a")["input_ids"]) + 1000 + len(
        tokenizer("b")["input_ids"]
    )


def test_other_tokens_are_left_to_the_tokenizer(tokenizer: Any) -> None:
    assert RunTokenizer.wrap(tokenizer, "a") is tokenizer
