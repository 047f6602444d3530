"""Checks of the sampling parameters, and the room an answer has in the context."""

from __future__ import annotations

from dataclasses import replace

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import Sampling

DEFAULT_MAX_TOKENS = 256
MOST_STOP_STRINGS = 16


def fit_sampling(
    sampling: Sampling, max_tokens: int | None, prompt_tokens: int, context: int
) -> Sampling:
    """Check the parameters and settle ``max_tokens``: 256, or what room is left, if not given.

    Raises:
        ServiceError: INVALID_REQUEST; QUESTION_TOO_LONG when the answer has no room.
    """
    _check(sampling, max_tokens)
    wanted = max_tokens or 1
    if prompt_tokens + wanted > context:
        raise ServiceError(
            Reason.QUESTION_TOO_LONG,
            f"video and question take {prompt_tokens} tokens and the answer may take {wanted}, "
            f"but the context holds {context}",
            prompt_tokens=prompt_tokens,
            max_tokens=wanted,
            limit=context,
        )
    room = min(DEFAULT_MAX_TOKENS, context - prompt_tokens)
    return replace(sampling, max_tokens=max_tokens or room)


def _check(sampling: Sampling, max_tokens: int | None) -> None:
    def check(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"sampling_params.{name} is {value!r}; it must be {accepted}",
                name=name, value=value, accepted=accepted,
            )  # fmt: skip

    s = sampling
    check(max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, "at least 1")
    check(0 <= s.temperature <= 100, "temperature", s.temperature,
          "0 to 100")  # fmt: skip
    check(s.top_p is None or 0 < s.top_p <= 1, "top_p", s.top_p, "more than 0 and at most 1")
    check(s.top_k is None or s.top_k >= -1, "top_k", s.top_k, "-1 (off), 0 (off) or more")
    check(s.repetition_penalty is None or 0 < s.repetition_penalty <= 100, "repetition_penalty",
          s.repetition_penalty, "more than 0 and at most 100")  # fmt: skip
    check(len(s.stop) <= MOST_STOP_STRINGS and all(s.stop), "stop", list(s.stop),
          f"at most {MOST_STOP_STRINGS} strings, none of them empty")  # fmt: skip
