"""``prefill.v1.VideoService``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from prefill.v1 import video_service_pb2 as pb
from prefill.v1 import video_service_pb2_grpc

from prefill_service.api.convert import video_to_proto
from prefill_service.api.types import Context
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics

if TYPE_CHECKING:
    from prefill_service.video.store import VideoStore

MAX_CHUNK_BYTES = 1 << 20


class VideoServicer(video_service_pb2_grpc.VideoServiceServicer):
    """Videos over gRPC."""

    def __init__(self, videos: VideoStore, metrics: Metrics) -> None:
        self._videos = videos
        self._metrics = metrics

    async def CreateUpload(
        self, request: pb.CreateUploadRequest, context: Context
    ) -> pb.CreateUploadResponse:
        """Reserve a video id."""
        record = await self._videos.create_upload(
            request.display_name, request.size_bytes, request.sha256, request.request_id
        )
        return pb.CreateUploadResponse(
            video=video_to_proto(record), max_chunk_bytes=MAX_CHUNK_BYTES
        )

    async def UploadChunks(
        self,
        request_iterator: AsyncIterator[pb.UploadChunksRequest],
        context: Context,
    ) -> pb.UploadChunksResponse:
        """Append bytes. Awaiting the disk is what holds a fast client back."""
        video_id, committed = "", 0
        async for chunk in request_iterator:
            if chunk.video_id and video_id and chunk.video_id != video_id:
                raise _invalid(f"one stream is for one video, not {video_id} and {chunk.video_id}")
            video_id = video_id or chunk.video_id
            if not video_id:
                raise _invalid("the first message of the stream has no video_id")
            if len(chunk.data) > MAX_CHUNK_BYTES:
                raise _invalid(
                    f"the chunk has {len(chunk.data)} bytes, the limit is {MAX_CHUNK_BYTES}"
                )
            committed = await self._videos.append(video_id, chunk.offset, chunk.data)
            self._metrics.uploaded_bytes.inc(len(chunk.data))
        if not video_id:
            raise _invalid("the stream has no messages")
        return pb.UploadChunksResponse(committed_bytes=committed)

    async def GetUploadStatus(
        self, request: pb.GetUploadStatusRequest, context: Context
    ) -> pb.GetUploadStatusResponse:
        """How many bytes are committed."""
        record = await self._videos.status(request.video_id)
        return pb.GetUploadStatusResponse(
            committed_bytes=record.committed_bytes,
            size_bytes=record.size_bytes,
            complete=record.committed_bytes == record.size_bytes,
        )

    async def FinishUpload(
        self, request: pb.FinishUploadRequest, context: Context
    ) -> pb.FinishUploadResponse:
        """Check and probe."""
        record = await self._videos.finish(request.video_id)
        return pb.FinishUploadResponse(video=video_to_proto(record))

    async def ImportVideo(
        self, request: pb.ImportVideoRequest, context: Context
    ) -> pb.ImportVideoResponse:
        """Take a file of the server."""
        record = await self._videos.import_path(
            request.path, request.display_name, request.request_id
        )
        return pb.ImportVideoResponse(video=video_to_proto(record))

    async def GetVideo(self, request: pb.GetVideoRequest, context: Context) -> pb.GetVideoResponse:
        """One video."""
        return pb.GetVideoResponse(video=video_to_proto(await self._videos.get(request.video_id)))

    async def ListVideos(
        self, request: pb.ListVideosRequest, context: Context
    ) -> pb.ListVideosResponse:
        """Videos, newest first."""
        records, token = await self._videos.list(request.page_size, request.page_token)
        return pb.ListVideosResponse(
            videos=[video_to_proto(record) for record in records], next_page_token=token
        )

    async def DeleteVideo(
        self, request: pb.DeleteVideoRequest, context: Context
    ) -> pb.DeleteVideoResponse:
        """Remove a video."""
        await self._videos.delete(request.video_id)
        return pb.DeleteVideoResponse()


def _invalid(message: str) -> ServiceError:
    return ServiceError(Reason.INVALID_REQUEST, message)
