"""transformers with SDPA: load the video, run the processor, generate; nothing is kept.

The child answers one JSON line per question on stdin with one on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from typing_extensions import override

from benchmarks.processes import cpu_seconds
from benchmarks.service.cases import QUESTIONS, Case
from benchmarks.service.systems import MAX_TOKENS, PENALTY, Asked, Measured, Setup, System

ROOT = Path(__file__).resolve().parents[2]
_ASKED_AGAIN_S = 30.0


class Transformers(System):
    """``generate`` in a process of its own, on all cores.

    Its second question is computed as the first one is, video and all: nothing outlives a call of
    ``generate``. A batch of five would be five such calls, so it is not asked; nor is a second
    question where the first one took more than half a minute.
    """

    name = "transformers"
    ranks = 1
    modes: tuple[str, ...] = ("exact",)

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.cold_start_s = 0.0

    def __enter__(self) -> Self:
        start = time.perf_counter()
        with (self._setup.folder / "transformers.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.service.hf", str(self._setup.checkpoint)],
                cwd=ROOT,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self._setup.cores),
                    "OMP_WAIT_POLICY": "passive",
                    "HF_HUB_OFFLINE": "1",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self._reply()
        except BaseException:
            self._process.kill()
            raise
        self.cold_start_s = time.perf_counter() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @override
    def measure(self, case: Case, mode: str) -> Measured:
        before = cpu_seconds(self.pid)
        first, stages = self._ask(case.video, QUESTIONS[0])
        first.cpu_s = cpu_seconds(self.pid) - before
        again = first.first_token_s <= _ASKED_AGAIN_S
        second = self._ask(case.video, QUESTIONS[1])[0] if again else None
        return Measured(first, second, None, stages=stages)

    def _ask(self, video: Path, question: str) -> tuple[Asked, dict[str, float]]:
        assert self._process.stdin is not None
        request = {"video": str(video), "question": question, "max_tokens": MAX_TOKENS}
        with suppress(BrokenPipeError):  # the missing reply is told instead
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        reply = self._reply()
        asked = Asked(reply["first_token_s"], reply["token_ids"], reply["prompt_token_ids"])
        return asked, reply["stages"]

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = (self._setup.folder / "transformers.log").read_text(errors="replace")
            raise RuntimeError(f"transformers ended: {' '.join(log.split()[-60:])}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def _serve(checkpoint: str) -> None:
    import torch
    import transformers
    from transformers import video_utils

    from prefill_service.compat import ensure_torchvision

    ensure_torchvision()
    hf: Any = transformers
    load_video: Any = video_utils.load_video
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no reply
    processor = hf.AutoProcessor.from_pretrained(checkpoint)
    model = hf.AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None  # as with ignore_eos elsewhere

    class FirstToken(hf.generation.streamers.BaseStreamer):  # type: ignore[misc]
        """Notes when the first token after the prompt is there."""

        def __init__(self) -> None:
            self.puts = 0
            self.time = 0.0

        def put(self, value: Any) -> None:
            self.puts += 1
            if self.puts == 2:  # the first is the prompt
                self.time = time.perf_counter()

        def end(self) -> None:
            pass

    def answer(video: str, question: str, max_tokens: int) -> dict[str, Any]:
        start = time.perf_counter()
        content = [{"type": "video", "path": video}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # With torchcodec the template would load the video itself.
        frames, metadata = load_video(
            video, backend="opencv", sample_indices_fn=processor.video_processor.sample_frames
        )
        inputs = processor(
            text=[text],
            videos=[frames],
            video_metadata=[metadata],
            do_sample_frames=False,
            return_tensors="pt",
        )
        prepared = time.perf_counter()
        streamer = FirstToken()
        ids = model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            streamer=streamer,
            repetition_penalty=PENALTY,
        )
        prompt = inputs["input_ids"][0].tolist()
        return {
            "first_token_s": streamer.time - start,
            "prompt_token_ids": prompt,
            "token_ids": ids[0, len(prompt) :].tolist(),
            "stages": {"decode": prepared - start, "generate": streamer.time - prepared},
        }

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
