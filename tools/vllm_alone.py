"""The reference: a stock vLLM with its vision tower, given the frames and the question.

No part of the service's prefill or hand-off is involved. Only the choice of frames and
their decoding are shared with it, so that both answer from the same pixels.

    python -m tools.vllm_alone MODEL video.mp4 "What happens?" "And then?"
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Question:
    """One question to the reference.

    Attributes:
        video: path of the file.
        messages: (role, text) in turn, first and last of the user; the video heads the first.
        max_tokens: tokens at most.
        ignore_eos: go on after the end-of-sequence token.
        system_prompt: system message, or empty for the chat template's default.
        sampling: fields of ``FrameSampling``.
        model_defaults: take sampling parameters from the checkpoint's generation_config.json, as
            ``vllm serve`` does; the temperature stays 0.
    """

    video: str
    messages: list[tuple[str, str]]
    max_tokens: int = 24
    ignore_eos: bool = False
    system_prompt: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    model_defaults: bool = False


@dataclass(frozen=True)
class Reference:
    """What vLLM alone made of a question."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str


def answer(
    model: str | Path,
    questions: Sequence[Question],
    dtype: str = "float32",
    *,
    timeout_s: float = 900.0,
    log: Path | None = None,
) -> list[Reference]:
    """Answer greedily in a fresh process, which has ended with all its children on return.

    Args:
        model: folder or hub id.
        questions: those about one video are best given in a row: its frames are kept.
        dtype: of weights and KV.
        timeout_s: wall clock for everything.
        log: file for vLLM's own log; discarded by default.

    Raises:
        RuntimeError: the process failed; the message ends with the last lines of its log.
        TimeoutError: it took longer than ``timeout_s``.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-alone-") as folder:
        result = Path(folder) / "result.json"
        request = Path(folder) / "request.json"
        log = log or Path(folder) / "vllm.log"
        request.write_text(json.dumps([dataclasses.asdict(question) for question in questions]))
        command = [sys.executable, "-m", "tools.vllm_alone", "--child", str(request), str(result)]
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, "--dtype", dtype, str(model)],
                cwd=ROOT,
                env=_environment(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"vLLM alone took longer than {timeout_s:g} s") from None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            tail = log.read_text(errors="replace").rstrip().splitlines()[-15:]
            last = tail[-1] if tail else "it logged nothing"
            raise RuntimeError(
                f"vLLM alone exited with code {code}: {last}\n" + "\n".join(tail[:-1])
            )
        return [Reference(**entry) for entry in json.loads(result.read_text())]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclass(frozen=True)
class _Prepared:
    """A question as vLLM's own front end takes it, before it is a prompt of tokens."""

    prompt: dict[str, Any]
    estimate: int  # prompt tokens, roughly


def _prepare(
    model: str, dtype: str, questions: Sequence[Question], folder: Path
) -> Iterator[_Prepared]:
    """Frames and chat text of each question. Frames: [frames, height, width, 3] uint8 RGB."""
    import numpy as np
    from transformers import AutoProcessor

    from prefill_service.config import VideoConfig
    from prefill_service.models.checkpoint import open_checkpoint
    from prefill_service.models.prefix_plan import FrameSampling
    from prefill_service.models.prefix_planner import PrefixPlanner
    from prefill_service.video.decoder.indexing import build_index
    from prefill_service.video.frame_stream import FrameStream

    checkpoint = open_checkpoint(model)
    planner = PrefixPlanner(checkpoint, dtype)
    processors: Any = AutoProcessor
    processor = processors.from_pretrained(checkpoint.path)
    previous: tuple[object, ...] = ()
    for question in questions:
        chosen = (question.video, question.system_prompt, sorted(question.sampling.items()))
        sampling = FrameSampling.from_dict(question.sampling)
        if chosen != previous:
            index = build_index(question.video, VideoConfig())
            index.save(folder / "index.npz")
            plan = planner.plan(index, "", sampling, question.system_prompt)
            with FrameStream.open(
                Path(question.video),
                folder / "index.npz",
                plan.frame_indices.tolist(),
                VideoConfig(),
            ) as stream:
                frames = np.stack(list(stream))
            previous = chosen
        stamped = planner.sampler.sample(index, sampling).metadata
        metadata = {
            "total_num_frames": stamped.total_num_frames,
            "fps": stamped.fps,
            "duration": stamped.duration,
            "frames_indices": stamped.frames_indices,
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        text = _chat(processor, question)
        yield _Prepared(
            {
                "prompt": text,
                "multi_modal_data": {"video": [(frames, metadata)]},
                "mm_processor_kwargs": _processor_kwargs(processor, sampling),
            },
            plan.num_tokens + len(text),
        )


def _chat(processor: Any, question: Question) -> str:
    """The chat template with the video as the head of the first user message."""
    chat: list[dict[str, Any]] = []
    if question.system_prompt:
        chat.append({"role": "system", "content": question.system_prompt})
    for number, (role, text) in enumerate(question.messages):
        content: Any = text
        if number == 0:
            content = [{"type": "video"}, {"type": "text", "text": text}]
        chat.append({"role": role, "content": content})
    rendered: str = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return rendered


def _processor_kwargs(processor: Any, sampling: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"do_sample_frames": False}
    size = dict(processor.video_processor.size)
    if sampling.max_pixels is not None:
        size["longest_edge"] = sampling.max_pixels
    if sampling.min_pixels is not None:
        size["shortest_edge"] = sampling.min_pixels
    if sampling.max_pixels is not None or sampling.min_pixels is not None:
        kwargs["size"] = size
    if sampling.cap_pixels_per_frame is not None:
        kwargs["cap_pixels_per_frame"] = sampling.cap_pixels_per_frame
    return kwargs


def _run_child(model: str, dtype: str, request: Path, result: Path) -> None:
    """Answer the questions of ``request`` in this process; write ``result``."""
    questions = [Question(**entry) for entry in json.loads(request.read_text())]
    prepared = list(_prepare(model, dtype, questions, result.parent))
    from vllm import LLM, SamplingParams

    longest = max(p.estimate + q.max_tokens for p, q in zip(prepared, questions, strict=True))
    context = -(-longest // 1024) * 1024
    llm = LLM(
        model=model,
        dtype=dtype,  # type: ignore[arg-type]
        max_model_len=context,
        max_num_batched_tokens=context,  # a span is encoded and prefilled in one step
        max_num_seqs=4,
        enforce_eager=True,
        limit_mm_per_prompt={"video": 1, "image": 0},
        seed=0,
    )
    references = []
    for item, question in zip(prepared, questions, strict=True):
        params = llm.get_default_sampling_params() if question.model_defaults else SamplingParams()
        params.temperature = 0
        params.max_tokens = question.max_tokens
        params.ignore_eos = question.ignore_eos
        output = llm.generate(item.prompt, params, use_tqdm=False)[0]  # type: ignore[arg-type]
        reference = Reference(
            list(output.prompt_token_ids or ()),
            list(output.outputs[0].token_ids),
            output.outputs[0].text,
        )
        references.append(dataclasses.asdict(reference))
    result.write_text(json.dumps(references))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("video", nargs="?")
    parser.add_argument("question", nargs="*")
    parser.add_argument("--dtype", default="float32", help="%(default)s")
    parser.add_argument("--max-tokens", type=int, default=24, help="%(default)s")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_child(arguments.model, arguments.dtype, *arguments.child)
        return
    if not arguments.question:
        parser.error("a video and at least one question are needed")
    questions = [
        Question(arguments.video, [("user", text)], arguments.max_tokens)
        for text in arguments.question
    ]
    for reference in answer(arguments.model, questions, arguments.dtype):
        print(json.dumps(dataclasses.asdict(reference) | {"prompt_token_ids": "..."}))


if __name__ == "__main__":
    main()
