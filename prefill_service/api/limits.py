"""What every field of every request may hold: one table, which docs/limits.md shows.

These bounds depend on nothing but the field, and are checked before any servicer sees a request.
Those of a video, the context or the configuration are checked where these are known, before
anything is computed from the value too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb

from prefill_service.api.limit_kinds import (
    SHOWN,
    Choice,
    Data,
    Flag,
    Items,
    Limit,
    Nested,
    Number,
    Text,
    Uuid,
)
from prefill_service.errors import Reason, ServiceError
from prefill_service.paging import DEFAULT_PAGE, MAX_PAGE, PAGE_TOKEN
from prefill_service.video.validation import MAX_NAME_CHARS, SHA256

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
MAX_CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 4 << 20
"""gRPC's own limit, beyond which a request does not arrive."""

_OF_CONTEXT = "and what the context has room for, at 6 bytes a token"
_ID = Text(64, required=True)
_REQUEST_ID = Uuid()
_PAGE = {
    "page_size": Number(
        0, INT32_MAX, also=f"0 is {DEFAULT_PAGE}; more than {MAX_PAGE} is taken as {MAX_PAGE}"
    ),
    "page_token": Text(
        64, pattern=PAGE_TOKEN, what="the next_page_token of the page before, or empty"
    ),
}
_OF_VIDEO = {"video_id": _ID}
_OF_JOB = {"job_id": _ID}
_PROMPT = Text(MAX_MESSAGE_BYTES, also=_OF_CONTEXT)
_NAME = Text(MAX_NAME_CHARS, characters=True)

LIMITS: Mapping[str, Mapping[str, Limit]] = {
    "CreateUploadRequest": {
        "display_name": _NAME,
        "size_bytes": Number(1, INT64_MAX, required=True, also="and `storage.max_upload_bytes`"),
        "sha256": Text(64, required=True, pattern=SHA256, what="64 hexadecimal digits"),
        "request_id": _REQUEST_ID,
        "allow_truncated": Flag(),
    },
    "UploadChunksRequest": {
        "video_id": Text(64, also="needed in the first message"),
        "offset": Number(0, INT64_MAX, also="the bytes committed so far"),
        "data": Data(MAX_CHUNK_BYTES),
    },
    "GetUploadStatusRequest": _OF_VIDEO,
    "FinishUploadRequest": _OF_VIDEO,
    "ImportVideoRequest": {
        "path": Text(4096, required=True, also="absolute, below `storage.import_roots`"),
        "display_name": _NAME,
        "request_id": _REQUEST_ID,
        "allow_truncated": Flag(),
    },
    "GetVideoRequest": _OF_VIDEO,
    "ListVideosRequest": _PAGE,
    "DeleteVideoRequest": _OF_VIDEO,
    "CreatePrefillJobRequest": {"spec": Nested(required=True), "request_id": _REQUEST_ID},
    "GetPrefillJobRequest": _OF_JOB,
    "ListPrefillJobsRequest": _PAGE,
    "CancelPrefillJobRequest": _OF_JOB,
    "WatchPrefillJobRequest": _OF_JOB,
    "InspectPrefillJobRequest": _OF_JOB,
    "TracePrefillJobRequest": _OF_JOB,
    "PrefillSpec": {
        "video_id": _ID,
        "sampling": Nested(),
        "system_prompt": _PROMPT,
        "attention": Nested(),
        "comparison": Nested(),
    },
    "FrameSampling": {
        "fps": Number(0, 10_000, above_low=True, also="the video's and the processor's frames"),
        "num_frames": Number(1, INT32_MAX, also="a temporal patch to the video's frames"),
        "max_pixels": Number(1, 2**44, also="`min_pixels` or more"),
        "min_pixels": Number(1, 2**44, also="`max_pixels` or less"),
        "cap_pixels_per_frame": Flag(),
        "by": Choice(prefill_pb.SampleBy),
        "max_frames": Number(1, INT32_MAX, also="a temporal patch or more"),
        "square_pixels": Flag(),
    },
    "AttentionSpec": {
        "quality": Choice(prefill_pb.Quality),
        "epsilon": Number(0, 1, below_high=True),
        "min_kept_mass": Number(0, 1),
    },
    "ComparisonSpec": {
        "method": Choice(prefill_pb.ComparisonMethod, required=True),
        "question": _PROMPT,
        "anchor_tokens": Number(0, INT32_MAX, also="less than the prefix has"),
        "passing_tokens": Number(0, INT32_MAX, also="a block's tokens where it has fewer"),
    },
    "AskRequest": {
        "spec": Nested(required=True),
        "messages": Items(1024, Nested()),
        "sampling_params": Nested(),
        "request_id": _REQUEST_ID,
    },
    "ChatMessage": {"role": Choice(answer_pb.Role, required=True), "text": _PROMPT},
    "SamplingParams": {
        "temperature": Number(0, 100),
        "top_p": Number(0, 1, above_low=True),
        "top_k": Number(-1, INT32_MAX, also="-1 and 0 switch it off"),
        "max_tokens": Number(1, INT32_MAX, also="what the context leaves"),
        "seed": Number(0, INT64_MAX),
        "stop": Items(16, Text(1024, required=True)),
        "repetition_penalty": Number(0, 100, above_low=True),
        "ignore_eos": Flag(),
    },
}
"""By message and field of ``prefill.v1``: every request, and what requests are made of."""


def check_request(request: Message) -> None:
    """Check every field of a request.

    Raises:
        ServiceError: INVALID_REQUEST, with the field's path, its value and what is accepted.
    """
    _check_fields(request, "")


def _check_fields(message: Message, path: str) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    for name, limit in LIMITS[message.DESCRIPTOR.name].items():
        value = getattr(message, name)
        # A field without presence that has its default is not set.
        given = message.HasField(name) if fields[name].has_presence else bool(value)
        if given or limit.required:
            _check_value(limit, value, f"{path}{name}")


def _check_value(limit: Limit, value: Any, path: str) -> None:
    if not limit.accepts(value):
        shown = limit.show(value)
        short = isinstance(value, str) and len(value) <= SHOWN
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"{path} is {shown}; it must be {limit}",
            name=path,
            value=value if short else shown,
            accepted=limit,
        )
    match limit:
        case Items():
            for number, element in enumerate(value):
                _check_value(limit.element, element, f"{path}[{number}]")
        case Nested():
            _check_fields(value, f"{path}.")
