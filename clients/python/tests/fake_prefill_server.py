"""A prefill-service in memory behind a real socket, with faults to switch on.

It keeps the contracts of protos/prefill/v1: offsets, states, idempotent request ids, rich
errors (built with the real google.rpc messages, which the client does not have).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import uuid
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from prefill.v1 import answer_service_pb2 as apb
from prefill.v1 import answer_service_pb2_grpc as answer_grpc
from prefill.v1 import prefill_service_pb2 as ppb
from prefill.v1 import prefill_service_pb2_grpc as prefill_grpc
from prefill.v1 import video_service_pb2 as vpb
from prefill.v1 import video_service_pb2_grpc as video_grpc

MAGIC = b"\x00\x00\x00\x18ftyp"
STAGE_UNITS = ((ppb.STAGE_DECODE, 8), (ppb.STAGE_VISION, 4), (ppb.STAGE_PREFILL, 400))


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


class FakeService(
    video_grpc.VideoServiceServicer,
    prefill_grpc.PrefillServiceServicer,
    answer_grpc.AnswerServiceServicer,
):
    def __init__(self) -> None:
        self.state = State()
        self.faults = Faults()

    async def _enter(self, rpc: str, context: Any) -> None:
        self.state.calls[rpc] += 1
        self.state.metadata = dict(context.invocation_metadata())
        await asyncio.sleep(self.faults.unary_delay_s)
        if self.faults.unavailable[rpc] > 0:
            self.faults.unavailable[rpc] -= 1
            await fail(context, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", "draining",
                       self.faults.retry_after_s)  # fmt: skip

    async def _leave(self, rpc: str, context: Any) -> None:
        if self.faults.unavailable_after[rpc] > 0:
            self.faults.unavailable_after[rpc] -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    async def _video(self, video_id: str, context: Any) -> vpb.Video:
        if video_id not in self.state.videos:
            await fail(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_VIDEO",
                       f"no video {video_id!r}", video_id=video_id)  # fmt: skip
        return self.state.videos[video_id]

    # videos

    async def CreateUpload(self, request, context):
        await self._enter("CreateUpload", context)
        state = self.state
        if request.request_id:
            assert uuid.UUID(request.request_id).version == 4
            arguments = request.SerializeToString(deterministic=True)
            if state.upload_arguments.setdefault(request.request_id, arguments) != arguments:
                await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST",
                           "request_id was used before with other arguments")  # fmt: skip
        video_id = state.uploads.get(request.request_id, "")
        if video_id not in state.videos:
            same = [v for v in state.videos.values()
                    if v.sha256 == request.sha256 and v.state == vpb.VIDEO_STATE_READY]  # fmt: skip
            if same:
                return vpb.CreateUploadResponse(video=same[0], max_chunk_bytes=256 << 10)
        if not video_id:
            video_id = new_id("vid_")
            state.uploads[request.request_id] = video_id
            state.data[video_id] = bytearray()
            video = vpb.Video(video_id=video_id, display_name=request.display_name,
                              state=vpb.VIDEO_STATE_UPLOADING, size_bytes=request.size_bytes,
                              sha256=request.sha256)  # fmt: skip
            video.create_time.GetCurrentTime()
            state.videos[video_id] = video
        await self._leave("CreateUpload", context)
        first = vpb.Video(video_id=video_id, state=vpb.VIDEO_STATE_UPLOADING)
        return vpb.CreateUploadResponse(
            video=state.videos.get(video_id, first), max_chunk_bytes=256 << 10
        )

    async def UploadChunks(self, request_iterator, context):
        await self._enter("UploadChunks", context)
        limits = self.faults.break_upload_after
        limit, received, video = (limits.pop(0) if limits else None), 0, None
        async for message in request_iterator:
            if video is None:
                video = await self._video(message.video_id, context)
            data = self.state.data[video.video_id]
            if message.offset != len(data):
                await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_OFFSET_MISMATCH",
                           f"offset {message.offset}, committed {len(data)}",
                           committed_bytes=str(len(data)))  # fmt: skip
            assert len(message.data) <= 256 << 10
            data.extend(message.data)
            video.committed_bytes = len(data)
            received += len(message.data)
            self.state.bytes_received += len(message.data)
            if self.faults.chunk_delay_s:
                await asyncio.sleep(self.faults.chunk_delay_s)
            if self.faults.ack_short:
                self.faults.ack_short -= 1
                break
            if limit is not None and received >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Stream removed")
        assert video is not None
        return vpb.UploadChunksResponse(committed_bytes=video.committed_bytes)

    async def GetUploadStatus(self, request, context):
        await self._enter("GetUploadStatus", context)
        video = await self._video(request.video_id, context)
        return vpb.GetUploadStatusResponse(
            committed_bytes=video.committed_bytes,
            size_bytes=video.size_bytes,
            complete=video.committed_bytes == video.size_bytes,
        )

    async def FinishUpload(self, request, context):
        await self._enter("FinishUpload", context)
        video = await self._video(request.video_id, context)
        data = bytes(self.state.data[video.video_id])
        if video.state != vpb.VIDEO_STATE_READY:
            if len(data) != video.size_bytes:
                await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "UPLOAD_INCOMPLETE",
                           f"{len(data)} of {video.size_bytes} bytes")  # fmt: skip
            if hashlib.sha256(data).hexdigest() != video.sha256:
                await self._refuse(video, context, grpc.StatusCode.DATA_LOSS,
                                   "UPLOAD_DIGEST_MISMATCH", "sha256 differs")  # fmt: skip
            if not data.startswith(MAGIC):
                await self._refuse(video, context, grpc.StatusCode.INVALID_ARGUMENT,
                                   "NOT_A_VIDEO",
                                   f"{video.display_name} is not a video")  # fmt: skip
            video.state = vpb.VIDEO_STATE_READY
            video.info.CopyFrom(vpb.VideoInfo(codec="h264", container="mov,mp4", width=320,
                                              height=240, frame_count=100, fps=25.0,
                                              keyframe_count=4))  # fmt: skip
            video.info.duration.FromMilliseconds(4000)
        await self._leave("FinishUpload", context)
        return vpb.FinishUploadResponse(video=video)

    async def _refuse(self, video, context, code, reason, message):
        video.state = vpb.VIDEO_STATE_FAILED
        video.error_reason, video.error_message = reason, message
        await fail(context, code, reason, message, video_id=video.video_id)

    async def ImportVideo(self, request, context):
        await self._enter("ImportVideo", context)
        if not request.path.startswith("/allowed/"):
            message = f"{request.path} is outside the import roots"
            await fail(context, grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED", message)
        video = vpb.Video(video_id=new_id("vid_"), state=vpb.VIDEO_STATE_READY,
                          display_name=request.display_name)  # fmt: skip
        self.state.videos[video.video_id] = video
        return vpb.ImportVideoResponse(video=video)

    async def GetVideo(self, request, context):
        await self._enter("GetVideo", context)
        return vpb.GetVideoResponse(video=await self._video(request.video_id, context))

    async def ListVideos(self, request, context):
        await self._enter("ListVideos", context)
        page, token = self._page(list(self.state.videos.values()), request)
        return vpb.ListVideosResponse(videos=page, next_page_token=token)

    def _page(self, items, request):
        items = items[::-1]
        start, size = int(request.page_token or 0), request.page_size or 50
        end = start + size
        return items[start:end], str(end) if end < len(items) else ""

    async def DeleteVideo(self, request, context):
        await self._enter("DeleteVideo", context)
        await self._video(request.video_id, context)
        del self.state.videos[request.video_id]
        await self._leave("DeleteVideo", context)
        return vpb.DeleteVideoResponse()

    # jobs

    async def _ready(self, spec, context):
        video = await self._video(spec.video_id, context)
        if video.state != vpb.VIDEO_STATE_READY:
            await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "VIDEO_NOT_READY",
                       f"{spec.video_id} is not READY")  # fmt: skip

    def _job(self, spec):
        key = spec.SerializeToString(deterministic=True)
        if key not in self.state.prefixes:
            job = ppb.PrefillJob(job_id=new_id("job_"), spec=spec, state=ppb.JOB_STATE_QUEUED)
            job.create_time.GetCurrentTime()
            self.state.jobs[job.job_id] = job
            self.state.prefixes[key] = job.job_id
        return self.state.jobs[self.state.prefixes[key]]

    async def _run(self, job):
        """Yields the job at each change, as two ranks take it to its end."""
        yield job
        if job.state != ppb.JOB_STATE_QUEUED:
            return
        self.state.prefills += 1
        job.state = ppb.JOB_STATE_RUNNING
        for stage, total in STAGE_UNITS:
            for rank in range(2):
                entry = job.progress.add(stage=stage, rank=rank, total=total)
                entry.elapsed.FromMilliseconds(1500)
            for _ in range(2):
                await asyncio.sleep(self.faults.prefill_delay_s)
                if job.state == ppb.JOB_STATE_CANCELLED:
                    yield job
                    return
                for entry in job.progress:
                    if entry.stage == stage:
                        entry.done += total // 2
                yield job
        if self.faults.job_error:
            job.state = ppb.JOB_STATE_FAILED
            job.error.reason, job.error.message = self.faults.job_error
        else:
            job.state, job.prefix_tokens = ppb.JOB_STATE_SUCCEEDED, 810
            job.result.CopyFrom(
                ppb.PrefillResult(prefix_id="pfx_1", prefix_tokens=810, video_tokens=800,
                                  grid_thw=[4, 20, 20],
                                  shards=[ppb.ShardRange(start_token=0, end_token=810, rank=1)],
                                  attention=attention_report(job.spec.attention))
            )  # fmt: skip
        yield job

    async def _known(self, job_id, context):
        if job_id not in self.state.jobs:
            await fail(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB", f"no job {job_id!r}")
        return self.state.jobs[job_id]

    async def CreatePrefillJob(self, request, context):
        await self._enter("CreatePrefillJob", context)
        await self._ready(request.spec, context)
        assert uuid.UUID(request.request_id).version == 4
        job = self._job(request.spec)
        self.state.job_requests[request.request_id] = job.job_id
        await self._leave("CreatePrefillJob", context)
        return ppb.CreatePrefillJobResponse(job=job)

    async def GetPrefillJob(self, request, context):
        await self._enter("GetPrefillJob", context)
        return ppb.GetPrefillJobResponse(job=await self._known(request.job_id, context))

    async def ListPrefillJobs(self, request, context):
        await self._enter("ListPrefillJobs", context)
        page, token = self._page(list(self.state.jobs.values()), request)
        return ppb.ListPrefillJobsResponse(jobs=page, next_page_token=token)

    async def CancelPrefillJob(self, request, context):
        await self._enter("CancelPrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state in (ppb.JOB_STATE_QUEUED, ppb.JOB_STATE_RUNNING):
            job.state = ppb.JOB_STATE_CANCELLED
        return ppb.CancelPrefillJobResponse(job=job)

    async def WatchPrefillJob(self, request, context):
        await self._enter("WatchPrefillJob", context)
        job = await self._known(request.job_id, context)
        async for update in self._run(job):
            yield ppb.WatchPrefillJobResponse(job=update)
            if self.faults.watch_break:
                self.faults.watch_break -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")

    async def InspectPrefillJob(self, request, context):
        await self._enter("InspectPrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state != ppb.JOB_STATE_SUCCEEDED:
            await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NO_ATTENTION_REPORT",
                       f"job {job.job_id} has no attention report")  # fmt: skip
        response = ppb.InspectPrefillJobResponse(job=job, attention=job.result.attention)
        if job.result.attention.layers:
            grid = [1.0, -1.0, -1.0, 0.5, 1.0, -1.0]
            response.block_map.CopyFrom(
                ppb.BlockMap(layer=1, kv_head=0, rows=2, columns=3, density=grid)
            )
            for second in range(4):
                patch = response.patches.add(mass=0.5 + second)
                patch.time.FromMilliseconds(2000 * second)
        return response

    async def TracePrefillJob(self, request, context):
        await self._enter("TracePrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state != ppb.JOB_STATE_SUCCEEDED:
            await fail(context, grpc.StatusCode.FAILED_PRECONDITION, "NO_TRACE",
                       f"job {job.job_id} has no trace")  # fmt: skip
        text = json.dumps({"traceEvents": [{"ph": "X", "name": "naïve"}, {"ph": "M"}]},
                          ensure_ascii=False)  # fmt: skip
        data = text.encode()
        for start in range(0, len(data), 7):  # also through the middle of a character
            yield ppb.TracePrefillJobResponse(data=data[start : start + 7])
            if self.faults.trace_break:
                self.faults.trace_break -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")

    # answers

    async def Ask(self, request, context):
        state, faults = self.state, self.faults
        await self._enter("Ask", context)
        state.asks.append(request)
        state.ask_active += 1
        state.ask_peak = max(state.ask_peak, state.ask_active)
        try:
            if faults.queue_full:
                faults.queue_full -= 1
                await fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "64 jobs")
            await self._check_question(request, context)
            await self._ready(request.spec, context)
            job = self._job(request.spec)
            async for update in self._run(job):
                yield apb.AskResponse(progress=apb.AskProgress(job=update))
            if faults.job_error:
                await fail(context, grpc.StatusCode.UNAVAILABLE, *faults.job_error)
            if faults.ask_break_before:
                faults.ask_break_before -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
            words = answer_words(request)
            for index, word in enumerate(words):
                if faults.ask_break_after and index == faults.ask_break_after:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
                await asyncio.sleep(faults.token_delay_s)
                yield apb.AskResponse(delta=apb.AskDelta(text=word, token_ids=[index]))
            if not faults.ask_truncate:
                yield apb.AskResponse(final=self._final(job, words))
        except (asyncio.CancelledError, GeneratorExit):
            # A cancellation that arrives while gRPC sends what was yielded ends its task, not
            # this generator, which is then closed.
            state.ask_cancelled += 1
            raise
        finally:
            state.ask_active -= 1

    async def _check_question(self, request, context):
        if not request.messages or not request.messages[-1].text.strip():
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "QUESTION_EMPTY",
                       "the question is empty")  # fmt: skip
        if len(request.messages[-1].text) > 1000:
            await fail(context, grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_EXCEEDED",
                       "1200 tokens, 1000 fit", tokens="1200", limit="1000")  # fmt: skip

    def _final(self, job, words):
        final = apb.AskFinal(
            finish_reason="stop", job_id=job.job_id, prefix_id="pfx_1",
            usage=apb.AskUsage(prompt_tokens=820, video_tokens=800, completion_tokens=len(words)),
        )  # fmt: skip
        final.timings.total.FromMilliseconds(1250)
        return final


def attention_report(spec: ppb.AttentionSpec) -> ppb.AttentionReport:
    """Exact where that was asked for; else two layers of two KV heads."""
    if spec.quality == ppb.QUALITY_EXACT:
        exact = ppb.AttentionMeasures(density=1, kept_mass_mean=1, kept_mass_p5=1, kept_mass_min=1)
        return ppb.AttentionReport(
            quality=ppb.QUALITY_EXACT, min_kept_mass=1, floor_met=True, total=exact
        )
    measures = ppb.AttentionMeasures(
        density=0.25, sampled_rows=64, kept_mass_mean=0.95, kept_mass_p5=0.875, kept_mass_min=0.75,
        output_error_mean=0.03125, output_error_p95=0.0625, tiles=40, tiles_redone=4, tiles_dense=1,
    )  # fmt: skip
    measures.attend.FromMilliseconds(1500)
    return ppb.AttentionReport(
        quality=spec.quality or ppb.QUALITY_BALANCED, epsilon=0.1, min_kept_mass=0.8,
        floor_met=True, sparse_from_tokens=512, total=measures,
        layers=[ppb.LayerAttention(layer=n, measures=measures, head_density=[0.375, 0.125])
                for n in range(2)],
    )  # fmt: skip


def answer_words(request: apb.AskRequest) -> list[str]:
    """The fake's answer names what it was asked, so that mixed-up answers are seen."""
    limit = request.sampling_params.max_tokens or 256
    return ["You ", "asked: ", *(w + " " for w in request.messages[-1].text.split())][:limit]


class FakeServer:
    """Runs the service on a thread of its own; can be stopped and started on the same port."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.service = FakeService()
        self.port = 0
        self._credentials = credentials
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Any = None
        self.start()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def state(self) -> State:
        return self.service.state

    @property
    def faults(self) -> Faults:
        return self.service.faults

    def start(self) -> None:
        self._call(self._start())

    def stop(self) -> None:
        self._call(self._server.stop(0))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def reset(self) -> None:
        self.service.state, self.service.faults = State(), Faults()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    async def _start(self) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.so_reuseport", 0),
            ]
        )
        video_grpc.add_VideoServiceServicer_to_server(self.service, self._server)
        prefill_grpc.add_PrefillServiceServicer_to_server(self.service, self._server)
        answer_grpc.add_AnswerServiceServicer_to_server(self.service, self._server)
        address = f"localhost:{self.port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        await self._server.start()
