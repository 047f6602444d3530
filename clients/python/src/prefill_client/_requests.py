"""From Python arguments to request messages."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any

from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill_client.attention import Quality
from prefill_client.types import (
    AskOptions,
    ComparisonMethod,
    FrameOptions,
    Message,
    QuestionLike,
    SampleBy,
    Video,
    VideoLike,
)

SAMPLING_NAMES = (
    "fps",
    "num_frames",
    "max_frames",
    "max_pixels",
    "min_pixels",
    "cap_pixels_per_frame",
)
DECODING_NAMES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "repetition_penalty",
    "ignore_eos",
)
ATTENTION_NAMES = ("quality", "epsilon", "min_kept_mass")
COMPARISON_NAMES = ("comparison", "comparison_question", "anchor_tokens", "passing_tokens")
FRAME_NAMES = (*SAMPLING_NAMES, "sample_by", "system_prompt", *ATTENTION_NAMES, *COMPARISON_NAMES)
ASK_NAMES = (*FRAME_NAMES, *DECODING_NAMES, "stop")

_VIDEO_ID = re.compile(r"vid_[0-9A-Za-z]+")
QUALITIES = tuple(quality.value for quality in Quality if quality is not Quality.UNSPECIFIED)
COMPARISONS = tuple(m.value for m in ComparisonMethod if m is not ComparisonMethod.UNSPECIFIED)
SAMPLED_BY = tuple(by.value for by in SampleBy if by is not SampleBy.UNSPECIFIED)
_ROLES = {"user": answer_pb.ROLE_USER, "assistant": answer_pb.ROLE_ASSISTANT}


def new_request_id() -> str:
    """Make a random UUID4."""
    return str(uuid.uuid4())


def upload_request_id(sha256: str, size: int, display_name: str) -> str:
    """Make a UUID4 that is the same for the same file, in this process and any later one.

    CreateUpload returns the first result for a repeated request id, so this is how an upload
    that an earlier process left unfinished is found again. It covers every argument of
    CreateUpload: an id that comes again with others is an error.
    """
    key = f"prefill-upload:{sha256}:{size}:{display_name}"
    digest = hashlib.sha256(key.encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def video_id_or_path(video: VideoLike) -> tuple[str | None, str | None]:
    """Tell an id from a path: ``(id, None)`` or ``(None, path)``."""
    if isinstance(video, Video):
        return video.video_id, None
    if isinstance(video, str) and _VIDEO_ID.fullmatch(video):
        return video, None
    return None, os.fspath(video)


def build_spec(video_id: str, options: FrameOptions) -> prefill_pb.PrefillSpec:
    """Make a PrefillSpec.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of the range of its field, no quality or no method, or is of
            a comparison that was not asked for.
    """
    check_names(options, FRAME_NAMES)
    spec = prefill_pb.PrefillSpec(video_id=video_id)
    _assign(spec, options, ("system_prompt",))
    _assign(spec.sampling, options, SAMPLING_NAMES)
    sample_by = options.get("sample_by")
    if sample_by is not None:
        _check_choice("sample_by", sample_by, SAMPLED_BY)
        spec.sampling.MergeFrom(prefill_pb.FrameSampling(by=f"SAMPLE_BY_{sample_by.upper()}"))
    quality = options.get("quality")
    if quality is not None:
        _check_choice("quality", quality, QUALITIES)
        dial = prefill_pb.AttentionSpec(quality=f"QUALITY_{quality.upper()}")
        spec.attention.CopyFrom(dial)
    _assign(spec.attention, options, ("epsilon", "min_kept_mass"))
    _assign_comparison(spec, options)
    return spec


def _assign_comparison(spec: prefill_pb.PrefillSpec, options: FrameOptions) -> None:
    method = options.get("comparison")
    if method is None:
        for name in COMPARISON_NAMES:
            if options.get(name) is not None:
                raise ValueError(f"{name} needs a comparison: {', '.join(COMPARISONS)}")
        return
    _check_choice("comparison", method, COMPARISONS)
    asked = prefill_pb.ComparisonSpec(method=f"COMPARISON_METHOD_{method.upper()}")
    asked.question = options.get("comparison_question") or ""
    _assign(asked, options, ("anchor_tokens", "passing_tokens"))
    spec.comparison.CopyFrom(asked)


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(
            f"{name} = {value!r} is not accepted; expected one of {', '.join(accepted)}"
        )


def build_ask(
    video_id: str, question: QuestionLike, options: AskOptions, request_id: str
) -> answer_pb.AskRequest:
    """Make an AskRequest. A leading "system" message is the same as ``system_prompt``.

    Raises:
        TypeError: an option is unknown or something has the wrong type.
        ValueError: a role is unknown, or a number is out of the range of its field.
    """
    check_names(options, ASK_NAMES)
    frames: Any = {name: options[name] for name in FRAME_NAMES if name in options}  # type: ignore[literal-required]
    turns = _turns(question)
    if turns and turns[0].role == "system":
        if frames.get("system_prompt"):
            raise ValueError("give a system message or system_prompt, not both")
        frames["system_prompt"] = turns.pop(0).content
    request = answer_pb.AskRequest(spec=build_spec(video_id, frames), request_id=request_id)
    for turn in turns:
        if turn.role not in _ROLES:
            raise ValueError(f"role must be user or assistant, not {turn.role!r}")
        request.messages.add(role=_ROLES[turn.role], text=turn.content)
    _assign(request.sampling_params, options, DECODING_NAMES)
    stop = options.get("stop") or ()
    request.sampling_params.stop.extend([stop] if isinstance(stop, str) else stop)
    return request


def _turns(question: QuestionLike) -> list[Message]:
    if isinstance(question, str):
        return [Message("user", question)]
    turns = []
    for item in question:
        if isinstance(item, Mapping):
            extra = sorted(set(item) - {"role", "content"})
            if extra or "role" not in item or "content" not in item:
                raise ValueError(f"a message has role and content, not {sorted(item)}")
            item = Message(item["role"], item["content"])
        if not isinstance(item, Message) or not isinstance(item.content, str):
            raise TypeError(f"a message's content must be text: {item!r}")
        turns.append(item)
    return turns


def check_names(options: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    """Refuse options that do not exist.

    Raises:
        TypeError: naming the option and the accepted ones.
    """
    for name in options:
        if name not in accepted:
            raise TypeError(f"unknown option {name!r}; accepted: {', '.join(accepted)}")


def _assign(message: Any, options: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        value = options.get(name)
        if value is None:
            continue
        try:
            setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} = {value!r} is not accepted: {error}") from error
