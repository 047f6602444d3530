"""The fake server's VideoService: offsets, digests, states, idempotent request ids."""

from __future__ import annotations

import asyncio
import hashlib
import uuid

import grpc
from fake_backend import MAGIC, Backend, fail, new_id, page_of

from prefill.v1 import video_service_pb2 as vpb
from prefill.v1 import video_service_pb2_grpc as video_grpc


class FakeVideos(video_grpc.VideoServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def CreateUpload(self, request, context):
        await self._backend.enter("CreateUpload", context)
        state = self._backend.state
        if request.request_id:
            assert uuid.UUID(request.request_id).version == 4
            arguments = request.SerializeToString(deterministic=True)
            if state.upload_arguments.setdefault(request.request_id, arguments) != arguments:
                await fail(
                    context,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "INVALID_REQUEST",
                    "request_id was used before with other arguments",
                )
        video_id = state.uploads.get(request.request_id, "")
        if video_id not in state.videos:
            same = [
                v
                for v in state.videos.values()
                if v.sha256 == request.sha256 and v.state == vpb.VIDEO_STATE_READY
            ]
            if same:
                return vpb.CreateUploadResponse(video=same[0], max_chunk_bytes=256 << 10)
        if not video_id:
            video_id = new_id("vid_")
            state.uploads[request.request_id] = video_id
            state.data[video_id] = bytearray()
            video = vpb.Video(
                video_id=video_id,
                display_name=request.display_name,
                state=vpb.VIDEO_STATE_UPLOADING,
                size_bytes=request.size_bytes,
                sha256=request.sha256,
            )
            video.create_time.GetCurrentTime()
            state.videos[video_id] = video
        await self._backend.leave("CreateUpload", context)
        first = vpb.Video(video_id=video_id, state=vpb.VIDEO_STATE_UPLOADING)
        return vpb.CreateUploadResponse(
            video=state.videos.get(video_id, first), max_chunk_bytes=256 << 10
        )

    async def UploadChunks(self, request_iterator, context):
        await self._backend.enter("UploadChunks", context)
        limits = self._backend.faults.break_upload_after
        limit = limits.pop(0) if limits else None
        received = 0
        video = None
        async for message in request_iterator:
            if video is None:
                video = await self._backend.video(message.video_id, context)
            data = self._backend.state.data[video.video_id]
            if message.offset != len(data):
                await fail(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "UPLOAD_OFFSET_MISMATCH",
                    f"offset {message.offset}, committed {len(data)}",
                    committed_bytes=str(len(data)),
                )
            assert len(message.data) <= 256 << 10
            data.extend(message.data)
            video.committed_bytes = len(data)
            received += len(message.data)
            self._backend.state.bytes_received += len(message.data)
            if self._backend.faults.chunk_delay_s:
                await asyncio.sleep(self._backend.faults.chunk_delay_s)
            if self._backend.faults.ack_short:
                self._backend.faults.ack_short -= 1
                break
            if limit is not None and received >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Stream removed")
        assert video is not None
        return vpb.UploadChunksResponse(committed_bytes=video.committed_bytes)

    async def GetUploadStatus(self, request, context):
        await self._backend.enter("GetUploadStatus", context)
        video = await self._backend.video(request.video_id, context)
        return vpb.GetUploadStatusResponse(
            committed_bytes=video.committed_bytes,
            size_bytes=video.size_bytes,
            complete=video.committed_bytes == video.size_bytes,
        )

    async def FinishUpload(self, request, context):
        await self._backend.enter("FinishUpload", context)
        video = await self._backend.video(request.video_id, context)
        data = bytes(self._backend.state.data[video.video_id])
        if video.state != vpb.VIDEO_STATE_READY:
            if len(data) != video.size_bytes:
                await fail(
                    context,
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "UPLOAD_INCOMPLETE",
                    f"{len(data)} of {video.size_bytes} bytes",
                )
            if hashlib.sha256(data).hexdigest() != video.sha256:
                await self._refuse(
                    video,
                    context,
                    grpc.StatusCode.DATA_LOSS,
                    reason="UPLOAD_DIGEST_MISMATCH",
                    message="sha256 differs",
                )
            if not data.startswith(MAGIC):
                await self._refuse(
                    video,
                    context,
                    grpc.StatusCode.INVALID_ARGUMENT,
                    reason="NOT_A_VIDEO",
                    message=f"{video.display_name} is not a video",
                )
            video.state = vpb.VIDEO_STATE_READY
            video.info.CopyFrom(
                vpb.VideoInfo(
                    codec="h264",
                    container="mov,mp4",
                    width=320,
                    height=240,
                    frame_count=100,
                    fps=25.0,
                    keyframe_count=4,
                )
            )
            video.info.duration.FromMilliseconds(4000)
            if video.display_name.startswith("joined"):
                video.warnings.add(reason="CLOCK_RESTARTS", message="its clock restarts")
        await self._backend.leave("FinishUpload", context)
        return vpb.FinishUploadResponse(video=video)

    async def _refuse(self, video, context, code, *, reason, message):
        video.state = vpb.VIDEO_STATE_FAILED
        video.error_reason = reason
        video.error_message = message
        await fail(context, code, reason, message, video_id=video.video_id)

    async def ImportVideo(self, request, context):
        await self._backend.enter("ImportVideo", context)
        if not request.path.startswith("/allowed/"):
            message = f"{request.path} is outside the import roots"
            await fail(context, grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED", message)
        video = vpb.Video(
            video_id=new_id("vid_"), state=vpb.VIDEO_STATE_READY, display_name=request.display_name
        )
        self._backend.state.videos[video.video_id] = video
        return vpb.ImportVideoResponse(video=video)

    async def GetVideo(self, request, context):
        await self._backend.enter("GetVideo", context)
        return vpb.GetVideoResponse(video=await self._backend.video(request.video_id, context))

    async def ListVideos(self, request, context):
        await self._backend.enter("ListVideos", context)
        page, token = page_of(list(self._backend.state.videos.values()), request)
        return vpb.ListVideosResponse(videos=page, next_page_token=token)

    async def DeleteVideo(self, request, context):
        await self._backend.enter("DeleteVideo", context)
        await self._backend.video(request.video_id, context)
        del self._backend.state.videos[request.video_id]
        await self._backend.leave("DeleteVideo", context)
        return vpb.DeleteVideoResponse()
