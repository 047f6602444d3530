"""What is asked, and the events of an answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prefill_service.generation.vllm_client import Sampling
from prefill_service.scheduling.job import JobRecord, PrefillSpec
from prefill_service.video.index import VideoWarning


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (``prefill.v1.AskRequest``).

    Attributes:
        messages: (role, text) pairs, roles "user" and "assistant".
        sampling: how to sample tokens, except ``max_tokens``.
        max_tokens: ``None`` for 256, or what room there is.
    """

    spec: PrefillSpec
    messages: tuple[tuple[str, str], ...]
    sampling: Sampling
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far the prefill is, and how much of the prompt vLLM has, once it has said so.

    Attributes:
        computed_tokens: tokens of the prompt that vLLM has computed or loaded.
        prompt_tokens: tokens of the whole prompt; 0 before vLLM has said anything.
    """

    job: JobRecord
    computed_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The next piece of the answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerFinal:
    """The end of the answer; times in seconds (``prefill.v1.AskTimings``, ``AskUsage``).

    Attributes:
        warnings: of the video.
        frame_indices, frame_seconds: the plan's.
    """

    finish_reason: str
    job_id: str
    prefix_id: str
    prefill_wait_s: float
    decoder_first_token_s: float
    first_token_s: float
    total_s: float
    handoff_s: float
    prompt_tokens: int
    video_tokens: int
    completion_tokens: int
    kv_tokens_moved: int
    kv_bytes_moved: int
    cached_tokens: int
    warnings: tuple[VideoWarning, ...]
    frame_indices: np.ndarray
    frame_seconds: np.ndarray


AnswerEvent = AnswerProgress | AnswerDelta | AnswerFinal
