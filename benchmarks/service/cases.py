"""What every system is asked: videos of given lengths, questions, and the prompt they make."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from prefill_service.config import VideoConfig
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_plan import FrameSampling, PrefixPlan
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.video.decoder.indexing import build_index
from prefill_service.video.frame_stream import FrameStream
from prefill_service.video.index import VideoIndex
from tools.make_video import write_video

QUESTIONS = (
    "What moves in the video?",
    "What colour is the background at the end?",
    "How many discs are there?",
    "Which disc is the largest one?",
    "Does anything leave the picture?",
    "What happens in the last scene?",
    "Describe the first scene.",
)
"""The first, the second, and a batch of five."""

BATCH = slice(2, 7)
THIRD = 2

SAMPLED_FPS = 2.0
"""What Qwen3-VL's processor, vLLM and the service all sample by default."""

FRAMES_AT_MOST = 768
"""vLLM's loader of Qwen3-VL videos takes no more."""

SOURCE_FPS = 24.0


class CaseError(ValueError):
    """No such case; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One video and the prompts that ask about it.

    Attributes:
        video: the file.
        frames: frames sampled from it.
        video_tokens: vision tokens of the prompt.
        prompts: token ids of the whole prompt, one list per question.
        frames_equal: whether the service's decoder and OpenCV (vLLM's) give the same pixels.
    """

    video: Path
    frames: int
    video_tokens: int
    prompts: tuple[list[int], ...]
    frames_equal: bool


class CaseMaker:
    """Makes cases for one checkpoint; videos are kept in ``folder`` and made once.

    Args:
        checkpoint: folder of the model.
        size: (width, height) of the videos' frames, which no processor then has to resize.
        folder: for videos.
    """

    def __init__(self, checkpoint: Path, size: tuple[int, int], folder: Path) -> None:
        opened = open_checkpoint(str(checkpoint))
        self._planner = PrefixPlanner(opened, "float32")
        self._context = opened.max_position_embeddings
        self._size = size
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, tokens: int, seed: int) -> Case:
        """The shortest video of at least ``tokens`` vision tokens.

        Raises:
            CaseError: it would need more frames than vLLM samples, the checkpoint makes fewer
                tokens of it, or has no room for as many.
        """
        per_patch = self._size[0] * self._size[1] // 32**2
        patches = -(-tokens // per_patch)
        if 2 * patches > FRAMES_AT_MOST:
            raise CaseError(
                f"{tokens} tokens need {2 * patches} frames of {per_patch / 2:g} tokens; "
                f"vLLM samples {FRAMES_AT_MOST} at most"
            )
        case = self.of_video(self._write(patches / SAMPLED_FPS * 2, seed))
        if case.video_tokens < tokens:
            raise CaseError(
                f"the checkpoint's processor makes {case.video_tokens} tokens of "
                f"{case.frames} frames of {self._size[0]}x{self._size[1]}, not {tokens}: "
                "its limit on pixels is lower"
            )
        if len(case.prompts[0]) >= self._context:
            raise CaseError(
                f"a prompt of {len(case.prompts[0])} tokens is longer than the checkpoint's "
                f"context of {self._context}"
            )
        return case

    def of_video(self, video: Path) -> Case:
        """The case of any video."""
        index = build_index(str(video), VideoConfig())
        plan = self._planner.plan(index, "", FrameSampling(), "")
        return Case(
            video=video,
            frames=len(plan.frame_indices),
            video_tokens=plan.num_video_tokens,
            prompts=tuple(
                self._planner.prompt_token_ids(plan, [("user", question)]) for question in QUESTIONS
            ),
            frames_equal=frames_equal(video, index, plan),
        )

    def _write(self, seconds: float, seed: int) -> Path:
        width, height = self._size
        path = self._folder / f"{width}x{height}-{seconds:g}s-{seed}.mp4"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self._folder) as name:
                write_video(
                    Path(name) / path.name,
                    seconds,
                    SOURCE_FPS,
                    width=width,
                    height=height,
                    seed=seed,
                    codec="libx264",
                ).replace(path)
        return path


def frames_equal(video: Path, index: VideoIndex, plan: PrefixPlan) -> bool:
    """Whether some sampled frames have the same pixels from the service's decoder and OpenCV."""
    wanted = _some(plan.frame_indices.tolist())
    with tempfile.TemporaryDirectory() as name:
        index.save(Path(name) / "index.npz")
        stream = FrameStream.open(video, Path(name) / "index.npz", wanted, VideoConfig())
        with stream as frames:
            ours = list(frames)
    return all(np.array_equal(a, b) for a, b in zip(ours, _opencv(video, wanted), strict=True))


def _some(indices: Sequence[int], count: int = 8) -> list[int]:
    """At most ``count`` of them, spread over the first minute or so of what they cover."""
    head = sorted(set(indices))[: 16 * count]
    return head[:: max(1, len(head) // count)][:count]


def _opencv(video: Path, wanted: Sequence[int]) -> list[np.ndarray]:
    capture = cv2.VideoCapture(str(video))
    found = []
    try:
        for number in range(wanted[-1] + 1):
            if not capture.grab():
                raise CaseError(f"OpenCV cannot read frame {number} of {video}")
            if number in wanted:
                found.append(capture.retrieve()[1][:, :, ::-1])
    finally:
        capture.release()
    return found
