"""The main promise: through the service, token for token, what vLLM alone answers.

mp4 → gRPC → rank processes → pages → vLLM without a vision tower, against a vLLM with its vision
tower on the same frames and against transformers, for both families, 1 to 4 ranks and all
exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from prefill_client import Message

from prefill_service.config import VideoConfig
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.indexer import index_video
from tests.oracles.transformers_forward import prefix_cache, processor_inputs
from tests.oracles.transformers_greedy import generate, greedy
from tests.support.service_process import service_process
from tests.vllm_server import VllmServer
from tools.vllm_alone import Question, Reference, answer

FAMILIES = ["qwen3_vl", "qwen2_5_vl"]
NEW_TOKENS = 16
VLLM_BLOCK = 128
QUESTIONS = ("What is happening in the video?", "Which colours does the last scene have?")
SIZES = {  # about 200 and at least 8,000 video tokens
    "short": {"seconds": 5, "fps": 8, "width": 256, "height": 160, "seed": 11},
    "long": {"seconds": 64, "fps": 8, "width": 416, "height": 320, "seed": 12},
}
SAMPLING = {
    ("qwen3_vl", "short"): {"fps": 2.0},
    ("qwen3_vl", "long"): {"fps": 2.0, "max_pixels": 416 * 320 * 128},
    ("qwen2_5_vl", "short"): {"num_frames": 10},
    ("qwen2_5_vl", "long"): {"fps": 2.0, "max_pixels": 416 * 320},
}


LONG = "Tell me what each of the shapes does, one after the other. " * 10
TEXT_FROM = 100
"""Tokens of a question from which on the ranks compute it; LONG has 260."""


def chats() -> list[list[tuple[str, str]]]:
    """Two questions, and a chat of two turns that takes the first one up again.

    Then a long question, and a chat that goes on after it.
    """
    first, second = QUESTIONS
    return [
        [("user", first)],
        [("user", second)],
        [("user", first), ("assistant", "A disc moves."), ("user", "Where to?")],
        [("user", LONG)],
        [("user", LONG), ("assistant", "A disc moves."), ("user", "Where to?")],
    ]


@pytest.fixture(scope="module")
def alone(
    checkpoint: Callable[..., Path], make_video: Callable[..., Path]
) -> Callable[[str], dict[str, list[Reference]]]:
    """``alone(family)[size]``: vLLM's own answers, one per chat; one process per family."""
    known: dict[str, dict[str, list[Reference]]] = {}

    def get(family: str) -> dict[str, list[Reference]]:
        if family not in known:
            questions = [
                Question(
                    str(make_video(**SIZES[size])),
                    chat,
                    NEW_TOKENS,
                    sampling=SAMPLING[family, size],
                )
                for size in SIZES
                for chat in chats()
            ]
            references = iter(answer(checkpoint(family), questions))
            known[family] = {size: [next(references) for _ in chats()] for size in SIZES}
        return known[family]

    return get


@pytest.mark.parametrize(
    ("family", "ranks", "exchange"),
    [
        ("qwen3_vl", 1, "gather"),
        ("qwen3_vl", 2, "ring"),
        ("qwen3_vl", 3, "multi_ring"),
        ("qwen3_vl", 4, "usp"),
        ("qwen2_5_vl", 2, "demand"),
        ("qwen2_5_vl", 3, "pass_q"),
        ("qwen2_5_vl", 4, "ulysses"),
        ("qwen3_vl", 4, "ulysses_gather"),
    ],  # gather on two ranks: test_faults.py, and others; all on all: tests/engine
)
def test_tokens_equal_vllm_alone(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    vllm: Callable[[str], VllmServer],
    alone: Callable[[str], dict[str, list[Reference]]],
    tmp_path: Path,
    family: str,
    ranks: int,
    exchange: str,
) -> None:
    url = vllm(family).url
    headers = vllm(family).decoder.headers
    # What an earlier service handed over must not answer for this one.
    assert httpx.post(f"{url}/reset_prefix_cache", headers=headers).is_success
    arguments = ("--ranks", str(ranks), *vllm(family).arguments, "--engine-exchange", exchange)
    arguments += ("--engine-text-from-tokens", str(TEXT_FROM))
    with (
        service_process(checkpoint(family), tmp_path, *arguments) as service,
        service.client() as client,
    ):
        for size, references in alone(family).items():
            video = client.upload(make_video(**SIZES[size]))
            prefix_tokens = 0
            for number, (chat, reference) in enumerate(zip(chats(), references, strict=True)):
                got = client.ask(
                    video,
                    [Message(role, text) for role, text in chat],
                    max_tokens=NEW_TOKENS,
                    timeout=240,
                    quality="exact",  # what vLLM computes
                    **SAMPLING[family, size],  # type: ignore[arg-type]
                ).result()
                assert list(got.token_ids) == reference.token_ids, f"{size}, chat {number}"
                assert got.text == reference.text
                usage = got.usage
                assert usage.prompt_tokens == len(reference.prompt_token_ids)
                assert got.frames.numbers == tuple(sorted(set(got.frames.numbers)))
                assert got.frames.times_s == tuple(
                    pytest.approx(number / video.info.fps) for number in got.frames.numbers
                )
                if number == 0:
                    job = client.job(got.job_id)
                    prefix_tokens = job.prefix_tokens
                    moved = job.result.communication
                    assert moved.exchange.split()[0] == exchange
                    received = sum(use.bytes_received for use in moved.collectives)
                    assert (received > 0) == (ranks > 1)
                    assert len(got.frames.numbers) == job.result.frames
                    assert usage.kv_tokens_moved == prefix_tokens
                    assert 150 < usage.video_tokens < 450 or usage.video_tokens >= 8000
                elif number == 1:
                    # vLLM holds the full blocks; the span's partial last block comes again
                    assert usage.kv_tokens_moved == prefix_tokens % VLLM_BLOCK
                elif number == 3:
                    # the ranks have computed all but the last token of it, vLLM only that one
                    assert usage.cached_tokens == usage.prompt_tokens - 1
                    known = prefix_tokens - prefix_tokens % VLLM_BLOCK
                    assert usage.kv_tokens_moved == usage.prompt_tokens - 1 - known
                    jobs = len(list(client.jobs()))
                elif number == 4:
                    assert len(list(client.jobs())) == jobs  # the first turn's text is there
                else:  # ... unless the chat's first turn completes a block vLLM has seen
                    assert usage.kv_tokens_moved in (0, prefix_tokens % VLLM_BLOCK)


@pytest.mark.parametrize("family", FAMILIES)
async def test_vllm_alone_equals_transformers(
    checkpoint: Callable[..., Path],
    make_video: Callable[..., Path],
    alone: Callable[[str], dict[str, list[Reference]]],
    tmp_path: Path,
    family: str,
) -> None:
    model = checkpoint(family)
    planner = PrefixPlanner(open_checkpoint(str(model)), "float32")
    for size, references in alone(family).items():
        video = make_video(**SIZES[size])
        index = await index_video(video, VideoConfig())
        index.save(tmp_path / "index.npz")
        sampling = FrameSampling(**SAMPLING[family, size])  # type: ignore[arg-type]
        plan = planner.plan(index, "", sampling, "")
        indices = plan.frame_indices.tolist()
        with FrameStream.open(video, tmp_path / "index.npz", indices, VideoConfig()) as stream:
            frames = np.stack(list(stream))
        text = planner.chat.prefix("")
        kwargs = planner.sampler.size_kwargs(sampling)
        inputs = processor_inputs(model, frames, plan, index, text=text, size_kwargs=kwargs)
        cache = prefix_cache(model, inputs, plan)
        for chat, reference in zip(chats(), references, strict=True):
            prompt = planner.prompt_token_ids(plan, chat)
            assert prompt == reference.prompt_token_ids
            assert greedy(model, cache, prompt, plan, new_tokens=NEW_TOKENS) == reference.token_ids
        if family == "qwen3_vl":  # positions agree: generate() itself, from the pixels on
            text = planner.chat.render("", chats()[0], add_generation_prompt=True)
            inputs = processor_inputs(model, frames, plan, index, text=text, size_kwargs=kwargs)
            assert generate(model, inputs, NEW_TOKENS) == references[0].token_ids
