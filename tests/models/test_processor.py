"""Processors, tokenizers and chat templates that cannot ask about a video are refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_planner import PrefixPlanner
from tests.models.weights.damage import edit_json

TEMPLATE = "chat_template.jinja"
TURN = "{% for message in messages %}{{ message.content[-1].text }}{% endfor %}"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"

Damage = Callable[[Path], object]


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_vl"), tmp_path / "model"))


def template(text: str) -> Damage:
    return lambda folder: (folder / TEMPLATE).write_text(text)


def rename_token(tokenizer: dict[str, Any]) -> None:
    """Give the video token another id, as a tokenizer of another model has."""
    by_content = {token["content"]: token for token in tokenizer["added_tokens"]}
    video = by_content["<|video_pad|>"]
    image = by_content["<|image_pad|>"]
    video["content"], image["content"] = image["content"], video["content"]
    names = tokenizer["model"]["vocab"]
    if "<|video_pad|>" in names:
        video_id = names["<|video_pad|>"]
        names["<|video_pad|>"] = names["<|image_pad|>"]
        names["<|image_pad|>"] = video_id


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no template": (lambda f: (f / TEMPLATE).unlink(), "the chat template is missing: neither"),
    "a text model's": (template(TURN), "expected one <|video_pad|> ahead of the question"),
    "video after": (template(TURN + VIDEO), "expected one <|video_pad|> ahead of the question"),
    "two videos": (template(VIDEO + VIDEO + TURN), "expected one <|video_pad|> ahead of"),
    "syntax": (template("{% for %}"), "the chat template cannot be rendered: "),
    "one turn only": (
        template(
            "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}"
            + VIDEO
            + TURN
        ),
        "the chat template cannot be rendered: one turn only",
    ),
    "another beginning": (
        template("{{ messages | length }}" + VIDEO + TURN),
        "the chat template does not begin every chat with the video in the same way",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "processor and tokenizer files: transformers refuses them: ",
    ),
    "another processor": (
        lambda f: edit_json(
            f,
            "processor_config.json",
            lambda config: config["video_processor"].update(video_processor_type="NoSuchClass"),
        ),
        "processor and tokenizer files: ",
    ),
    "a least size beyond the context": (
        lambda f: edit_json(
            f,
            "processor_config.json",
            lambda config: config["video_processor"]["size"].update(
                shortest_edge=2**62, longest_edge=2**62
            ),
        ),
        "processor and tokenizer files: enlarge 4 frames of 320 x 240 pixels to ",
    ),
    "another tokenizer": (
        lambda f: edit_json(f, "tokenizer.json", rename_token),
        "processor and tokenizer files: mark a video with other tokens than ",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_ask_about_a_video(folder: Path, kind: str) -> None:
    damage, text = DAMAGES[kind]
    damage(folder)
    with pytest.raises(ServiceError) as caught:
        PrefixPlanner(open_checkpoint(str(folder)), "float32")
    assert caught.value.reason is Reason.MODEL_INVALID
    assert text in caught.value.message
    assert caught.value.metadata["file"]


def test_a_tokenizer_larger_than_the_vocabulary(folder: Path) -> None:
    def add(tokenizer: dict[str, Any]) -> None:
        last = tokenizer["added_tokens"][-1]
        for number in range(1, 100):  # more than the rows that the vocabulary is padded with
            token = dict(last, content=f"<|{number} more|>", id=last["id"] + number)
            tokenizer["added_tokens"].append(token)

    edit_json(folder, "tokenizer.json", add)
    checkpoint = open_checkpoint(str(folder))
    with pytest.raises(ServiceError, match=r"token id \d+ is beyond vocab_size \d+ of config"):
        PrefixPlanner(checkpoint, "float32")


def test_a_template_in_an_older_file(folder: Path) -> None:
    text = (folder / TEMPLATE).read_text()
    (folder / TEMPLATE).unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    planner = PrefixPlanner(open_checkpoint(str(folder)), "float32")
    assert "<|video_pad|>" in planner.chat.prefix("")
