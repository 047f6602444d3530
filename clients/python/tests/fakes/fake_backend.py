"""What the fake server's services share: what it knows, its faults, and its rich errors.

The errors are built with the real google.rpc messages, which the client does not have.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from prefill.v1 import answer_service_pb2 as apb
from prefill.v1 import prefill_service_pb2 as ppb
from prefill.v1 import video_service_pb2 as vpb

MAGIC = b"\x00\x00\x00\x18ftyp"


@dataclass
class Faults:
    """Each is counted down as it strikes."""

    unavailable: Counter[str] = field(default_factory=Counter)  # rpc -> times before the work
    unavailable_after: Counter[str] = field(default_factory=Counter)  # rpc -> times after it
    retry_after_s: float = 0.0
    break_upload_after: list[int] = field(default_factory=list)  # bytes of each stream
    ack_short: int = 0  # uploads ended with OK after their first chunk
    queue_full: int = 0  # Asks refused
    ask_break_before: int = 0  # Asks that die before their first token
    ask_break_after: int = 0  # tokens after which the next Ask dies; 0: never
    ask_sampled: bool = False  # every Ask but the first is answered otherwise
    intake: tuple[int, ...] = ()  # of 1000 tokens, what vLLM says that it has
    ask_truncate: bool = False  # Ask ends without a final message
    trace_break: int = 0  # traces that die after their first message
    watch_break: int = 0  # watches that die after their first message
    job_error: tuple[str, str] | None = None
    unary_delay_s: float = 0.0
    chunk_delay_s: float = 0.0
    token_delay_s: float = 0.0
    prefill_delay_s: float = 0.0


@dataclass
class State:
    """Everything the server knows; outlives a restart of the server."""

    videos: dict[str, vpb.Video] = field(default_factory=dict)
    data: dict[str, bytearray] = field(default_factory=dict)
    uploads: dict[str, str] = field(default_factory=dict)  # request_id -> video_id
    upload_arguments: dict[str, bytes] = field(default_factory=dict)
    jobs: dict[str, ppb.PrefillJob] = field(default_factory=dict)
    prefixes: dict[bytes, str] = field(default_factory=dict)  # spec -> job_id
    job_requests: dict[str, str] = field(default_factory=dict)
    bytes_received: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    asks: list[apb.AskRequest] = field(default_factory=list)
    ask_active: int = 0
    ask_peak: int = 0
    ask_cancelled: int = 0
    metadata: dict[str, str] = field(default_factory=dict)
    prefills: int = 0


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex[:26]


async def fail(
    context: Any,
    code: grpc.StatusCode,
    reason: str,
    message: str,
    *,
    retry_after_s: float = 0.0,
    **metadata: str,
) -> None:
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain="prefill-service", metadata=metadata)
    details: list[Any] = [info, error_details_pb2.RequestInfo(request_id="server-" + reason)]
    if retry_after_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
        details.append(retry)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


def page_of(items, request):
    """The page a request asks for, newest first, and the token of the next one."""
    items = items[::-1]
    start = int(request.page_token or 0)
    size = request.page_size or 50
    end = start + size
    return items[start:end], str(end) if end < len(items) else ""


class Backend:
    """What every service of the server knows; a reset gives it a fresh state and no faults."""

    def __init__(self) -> None:
        self.state = State()
        self.faults = Faults()

    async def enter(self, rpc: str, context: Any) -> None:
        self.state.calls[rpc] += 1
        self.state.metadata = dict(context.invocation_metadata())
        await asyncio.sleep(self.faults.unary_delay_s)
        if self.faults.unavailable[rpc] > 0:
            self.faults.unavailable[rpc] -= 1
            await fail(
                context,
                grpc.StatusCode.UNAVAILABLE,
                "SHUTTING_DOWN",
                "draining",
                retry_after_s=self.faults.retry_after_s,
            )

    async def leave(self, rpc: str, context: Any) -> None:
        if self.faults.unavailable_after[rpc] > 0:
            self.faults.unavailable_after[rpc] -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    async def video(self, video_id: str, context: Any) -> vpb.Video:
        if video_id not in self.state.videos:
            await fail(
                context,
                grpc.StatusCode.NOT_FOUND,
                "UNKNOWN_VIDEO",
                f"no video {video_id!r}",
                video_id=video_id,
            )
        return self.state.videos[video_id]

    async def check_ready(self, spec, context):
        video = await self.video(spec.video_id, context)
        if video.state != vpb.VIDEO_STATE_READY:
            await fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "VIDEO_NOT_READY",
                f"{spec.video_id} is not READY",
            )
