"""From Python arguments to request messages."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill_client._arguments import (
    INT32_MAX,
    INT64_MAX,
    MESSAGE_BYTES,
    Range,
    check_choice,
    check_flag,
    check_text,
    refuse,
)
from prefill_client.attention import Quality
from prefill_client.types import (
    AskOptions,
    ComparisonMethod,
    FrameOptions,
    Message,
    QuestionLike,
    SampleBy,
    Video,
)

Check: TypeAlias = Callable[[str, object], object]

_COUNT = Range(1, INT32_MAX, integer=True)
_PIXELS = Range(1, 2**44, integer=True)
_SAMPLING: dict[str, Check] = {
    "fps": Range(0, 10_000, above_low=True).check,
    "num_frames": _COUNT.check,
    "max_frames": _COUNT.check,
    "max_pixels": _PIXELS.check,
    "min_pixels": _PIXELS.check,
    "cap_pixels_per_frame": check_flag,
    "square_pixels": check_flag,
}
_ATTENTION: dict[str, Check] = {
    "epsilon": Range(0, 1, below_high=True).check,
    "min_kept_mass": Range(0, 1).check,
}
_COMPARISON: dict[str, Check] = {
    "anchor_tokens": Range(0, INT32_MAX, integer=True).check,
    "passing_tokens": Range(0, INT32_MAX, integer=True).check,
}
_DECODING: dict[str, Check] = {
    "max_tokens": _COUNT.check,
    "temperature": Range(0, 100).check,
    "top_p": Range(0, 1, above_low=True).check,
    "top_k": Range(-1, INT32_MAX, integer=True).check,
    "seed": Range(0, INT64_MAX, integer=True).check,
    "repetition_penalty": Range(0, 100, above_low=True).check,
    "ignore_eos": check_flag,
}
ATTENTION_NAMES = ("quality", *_ATTENTION)
COMPARISON_NAMES = ("comparison", "comparison_question", *_COMPARISON)
FRAME_NAMES = (*_SAMPLING, "sample_by", "system_prompt", *ATTENTION_NAMES, *COMPARISON_NAMES)
ASK_NAMES = (*FRAME_NAMES, *_DECODING, "stop")
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024
MAX_MESSAGES = 1024

_VIDEO_ID = re.compile(r"vid_[0-9A-Za-z]+")
# A Path made of a URL has one slash only. One letter is a drive of Windows.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/|(?:(data):)[\w.+/-]*[;,]", re.IGNORECASE)
_FETCH = {
    "http": "download it first, for example with curl -LO, or give upload() an open response",
    "https": "download it first, for example with curl -LO, or give upload() an open response",
    "s3": "download it first, for example with aws s3 cp",
    "gs": "download it first, for example with gcloud storage cp",
    "data": "give upload() the decoded bytes",
}
QUALITIES = tuple(quality.value for quality in Quality if quality is not Quality.UNSPECIFIED)
COMPARISONS = tuple(m.value for m in ComparisonMethod if m is not ComparisonMethod.UNSPECIFIED)
SAMPLED_BY = tuple(by.value for by in SampleBy if by is not SampleBy.UNSPECIFIED)
_ROLES = {"user": answer_pb.ROLE_USER, "assistant": answer_pb.ROLE_ASSISTANT}


def new_request_id() -> str:
    """Make a random UUID4."""
    return str(uuid.uuid4())


def upload_request_id(
    sha256: str, size: int, display_name: str, *, allow_truncated: bool = False
) -> str:
    """Make a UUID4 that is the same for the same file, in this process and any later one.

    CreateUpload returns the first result for a repeated request id, so this is how an upload
    that an earlier process left unfinished is found again. It covers every argument of
    CreateUpload: an id that comes again with others is an error.
    """
    allowed = ":allow_truncated" if allow_truncated else ""
    key = f"prefill-upload:{sha256}:{size}:{display_name}{allowed}"
    digest = hashlib.sha256(key.encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))


def split_video(video: object) -> tuple[str | None, Any]:
    """Tell an id from what has to be uploaded: ``(id, None)`` or ``(None, what)``.

    Raises:
        ArgumentError: as ``source_of``.
    """
    if isinstance(video, Video):
        return check_text("video", video.video_id), None
    if isinstance(video, str) and _VIDEO_ID.fullmatch(video):
        return video, None
    return None, source_of("video", video)


def source_of(name: str, video: object) -> Any:
    """What is uploaded: a path (str), or bytes or a file object as they were given.

    Raises:
        ArgumentError: it is none of these, or a URL of something that is not a file here.
    """
    if isinstance(video, str | os.PathLike):
        return local_path(name, video)
    held = isinstance(video, bytes | bytearray | memoryview)
    if not held and not callable(getattr(video, "read", None)):
        known = "" if name == "path" else "a Video, the id of one, "
        refuse(name, video, f"{known}a path, bytes or an open binary file")
    return video


def local_path(name: str, value: object) -> str:
    """The path of a file that is given as a path or as a file:// URL.

    Raises:
        ArgumentError: it is neither, or the URL is not one of a file on this machine.
    """
    if not isinstance(value, str | os.PathLike):
        refuse(name, value, "a path")
    path: str = os.fsdecode(value)
    found = _URL.match(path)
    if found is None or os.path.exists(path):
        return _check_path(name, path)
    scheme = (found[1] or found[2]).lower()
    if scheme != "file":
        hint = _FETCH.get(scheme, "fetch it first")
        refuse(name, path, f"a file on this machine: URLs are not fetched; {hint}")
    if "?" in path or "#" in path:
        refuse(name, path, "a file:// URL in which ? and # are written %3F and %23")
    parts = urlsplit(path)
    if parts.netloc.lower() not in ("", "localhost"):
        refuse(name, path, "a file:// URL of this machine, file:///path")
    path = unquote(parts.path, errors="surrogateescape")
    if not path.startswith("/"):
        refuse(name, value, "a file:// URL with an absolute path, file:///path")
    return _check_path(name, path)


def _check_path(name: str, path: str) -> str:
    try:
        usable = bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a surrogate that no name on the disk can be
        usable = False
    if not usable:
        refuse(name, path, "the path of a file")
    return path


def build_spec(video_id: str, options: FrameOptions) -> prefill_pb.PrefillSpec:
    """Make a PrefillSpec.

    Raises:
        TypeError: an option is unknown.
        ArgumentError: an option has the wrong type or is out of range, is no quality or no method,
            or is of a comparison that was not asked for.
    """
    check_names(options, FRAME_NAMES)
    spec = prefill_pb.PrefillSpec(video_id=video_id)
    _assign(spec, options, {"system_prompt": check_text})
    _assign(spec.sampling, options, _SAMPLING)
    for other in ("fps", "max_frames"):
        if options.get("num_frames") is not None and options.get(other) is not None:
            refuse("num_frames", options["num_frames"], f"nothing beside {other}, or no {other}")
    sample_by = options.get("sample_by")
    if sample_by is not None:
        check_choice("sample_by", sample_by, SAMPLED_BY)
        spec.sampling.MergeFrom(prefill_pb.FrameSampling(by=f"SAMPLE_BY_{sample_by.upper()}"))
    quality = options.get("quality")
    if quality is not None:
        check_choice("quality", quality, QUALITIES)
        dial = prefill_pb.AttentionSpec(quality=f"QUALITY_{quality.upper()}")
        spec.attention.CopyFrom(dial)
    _assign(spec.attention, options, _ATTENTION)
    _assign_comparison(spec, options)
    return spec


def _assign_comparison(spec: prefill_pb.PrefillSpec, options: FrameOptions) -> None:
    method = options.get("comparison")
    if method is None:
        for name in COMPARISON_NAMES:
            value = options.get(name)
            if value is not None:
                refuse(name, value, f"nothing without a comparison: {', '.join(COMPARISONS)}")
        return
    check_choice("comparison", method, COMPARISONS)
    asked = prefill_pb.ComparisonSpec(method=f"COMPARISON_METHOD_{method.upper()}")
    asked.question = check_text("comparison_question", options.get("comparison_question") or "")
    _assign(asked, options, _COMPARISON)
    spec.comparison.CopyFrom(asked)


def build_ask(
    video_id: str, question: QuestionLike, options: AskOptions, request_id: str
) -> answer_pb.AskRequest:
    """Make an AskRequest. A leading "system" message is the same as ``system_prompt``.

    Raises:
        TypeError: an option is unknown.
        ArgumentError: something has the wrong type or is out of range, a role is unknown, or all
            together is more than the server takes.
    """
    check_names(options, ASK_NAMES)
    frames: Any = {name: options[name] for name in FRAME_NAMES if name in options}  # type: ignore[literal-required]
    turns = _turns(question)
    before = 0
    if turns and turns[0].role == "system":
        before = 1
        if frames.get("system_prompt"):
            refuse("system_prompt", frames["system_prompt"], "nothing beside a system message")
        frames["system_prompt"] = turns.pop(0).content
    request = answer_pb.AskRequest(spec=build_spec(video_id, frames), request_id=request_id)
    for number, turn in enumerate(turns, start=before):
        if turn.role not in _ROLES:
            refuse(f"question[{number}].role", turn.role, "user, assistant, or system at the head")
        request.messages.add(role=_ROLES[turn.role], text=turn.content)
    _assign(request.sampling_params, options, _DECODING)
    request.sampling_params.stop.extend(_stops(options.get("stop")))
    size = request.ByteSize()
    if size > MESSAGE_BYTES:
        refuse("question", f"{size} bytes", f"at most {MESSAGE_BYTES} bytes, options included")
    return request


def _stops(stop: object) -> list[str]:
    if stop is None:
        return []
    if isinstance(stop, str):
        stop = [stop]
    if isinstance(stop, bytes | Mapping) or not isinstance(stop, Iterable):
        refuse("stop", stop, "text or a list of texts")
    texts = list[str]()
    for number, text in enumerate(stop):
        if number == MAX_STOP_STRINGS:
            refuse("stop", texts, f"at most {MAX_STOP_STRINGS} texts")
        name = f"stop[{number}]"
        if not 1 <= len(check_text(name, text).encode()) <= MAX_STOP_BYTES:
            refuse(name, text, f"1 to {MAX_STOP_BYTES} bytes")
        texts.append(text)
    return texts


def _turns(question: object) -> list[Message]:
    """The messages of a question, with roles and contents that are text."""
    if isinstance(question, str):
        return [Message("user", check_text("question", question))]
    if isinstance(question, bytes | bytearray | Mapping) or not isinstance(question, Iterable):
        refuse("question", question, "text, or a list of messages with role and content")
    turns = []
    for number, item in enumerate(question):
        name = f"question[{number}]"
        if number > MAX_MESSAGES:  # one is the system's
            refuse(name, item, f"at most {MAX_MESSAGES} messages")
        if isinstance(item, Mapping):
            if set(item) != {"role", "content"}:
                refuse(name, item, "a message with role and content, and nothing else")
            item = Message(item["role"], item["content"])
        if not isinstance(item, Message):
            refuse(name, item, 'a Message, or {"role": ..., "content": ...}')
        check_text(f"{name}.role", item.role)
        check_text(f"{name}.content", item.content)
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


def _assign(message: Any, options: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for name, check in checks.items():
        value = options.get(name)
        if value is not None:
            setattr(message, name, check(name, value))
