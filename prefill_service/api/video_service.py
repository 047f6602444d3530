"""``prefill.v1.VideoService``, for videos: uploaded, imported, listed, deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING

import grpc
from prefill.v1 import video_service_pb2 as pb
from prefill.v1 import video_service_pb2_grpc
from typing_extensions import override

from prefill_service.api.limits import MAX_CHUNK_BYTES
from prefill_service.api.servicer import Context, Servicer
from prefill_service.api.time_messages import duration_to_proto, timestamp_to_proto
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.metrics import Metrics
from prefill_service.video.index import VideoWarning

if TYPE_CHECKING:
    from prefill_service.video.geometry import Geometry
    from prefill_service.video.records import VideoInfo, VideoRecord
    from prefill_service.video.store import VideoStore


class VideoServicer(video_service_pb2_grpc.VideoServiceServicer, Servicer):
    """Stored videos over gRPC.

    Args:
        review: warnings of frames that the model being served does not take.
        upload_idle_s: an upload stream that sends nothing for so long ends.
    """

    service_name = pb.DESCRIPTOR.services_by_name["VideoService"].full_name

    def __init__(
        self,
        videos: VideoStore,
        metrics: Metrics,
        review: Callable[[Geometry], list[VideoWarning]] = lambda geometry: [],
        *,
        upload_idle_s: float = 60.0,
    ) -> None:
        self._videos = videos
        self._metrics = metrics
        self._review = review
        self._upload_idle_s = upload_idle_s

    @override
    def register_handlers(self, server: grpc.aio.Server) -> None:
        video_service_pb2_grpc.add_VideoServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def CreateUpload(
        self, request: pb.CreateUploadRequest, context: Context
    ) -> pb.CreateUploadResponse:
        """Announce a file; answers with the upload or the READY video of the same bytes."""
        record = await self._videos.create_upload(
            request.display_name,
            request.size_bytes,
            request.sha256,
            request.request_id,
            allow_truncated=request.allow_truncated,
        )
        return pb.CreateUploadResponse(
            video=self._to_proto(record), max_chunk_bytes=MAX_CHUNK_BYTES
        )

    async def UploadChunks(
        self,
        request_iterator: AsyncIterator[pb.UploadChunksRequest],
        context: Context,
    ) -> pb.UploadChunksResponse:
        """Append chunks to an upload. Waiting for the disk holds a fast client back."""
        video_id = ""
        committed = 0
        async for chunk in self._with_idle_limit(request_iterator):
            if chunk.video_id and video_id and chunk.video_id != video_id:
                raise _invalid(f"one stream is for one video, not {video_id} and {chunk.video_id}")
            video_id = video_id or chunk.video_id
            if not video_id:
                raise _invalid("the first message of the stream has no video_id")
            committed = await self._videos.append_chunk(video_id, chunk.offset, chunk.data)
            self._metrics.uploaded_bytes.inc(len(chunk.data))
        if not video_id:
            raise _invalid("the stream has no messages")
        return pb.UploadChunksResponse(committed_bytes=committed)

    async def _with_idle_limit(
        self, chunks: AsyncIterator[pb.UploadChunksRequest]
    ) -> AsyncIterator[pb.UploadChunksRequest]:
        """The chunks; raises UPLOAD_IDLE if the next one does not come."""
        waiting = aiter(chunks)
        while True:
            try:
                yield await asyncio.wait_for(anext(waiting), self._upload_idle_s)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise ServiceError(
                    Reason.UPLOAD_IDLE,
                    f"the upload stream sent nothing for {self._upload_idle_s:g} s, which is the "
                    "limit; go on where GetUploadStatus says",
                    limit_s=self._upload_idle_s,
                ) from None

    async def GetUploadStatus(
        self, request: pb.GetUploadStatusRequest, context: Context
    ) -> pb.GetUploadStatusResponse:
        """The bytes committed of an upload, which is where it goes on."""
        record = await self._videos.get_video(request.video_id)
        return pb.GetUploadStatusResponse(
            committed_bytes=record.committed_bytes,
            size_bytes=record.size_bytes,
            complete=record.committed_bytes == record.size_bytes,
        )

    async def FinishUpload(
        self, request: pb.FinishUploadRequest, context: Context
    ) -> pb.FinishUploadResponse:
        """Check the bytes and index them; answers with the READY video."""
        record = await self._videos.finish_upload(request.video_id)
        return pb.FinishUploadResponse(video=self._to_proto(record))

    async def ImportVideo(
        self, request: pb.ImportVideoRequest, context: Context
    ) -> pb.ImportVideoResponse:
        """Copy a file of the server's machine; answers with the READY video."""
        record = await self._videos.import_video(
            request.path,
            request.display_name,
            request.request_id,
            allow_truncated=request.allow_truncated,
        )
        return pb.ImportVideoResponse(video=self._to_proto(record))

    async def GetVideo(self, request: pb.GetVideoRequest, context: Context) -> pb.GetVideoResponse:
        """A video in any state."""
        return pb.GetVideoResponse(
            video=self._to_proto(await self._videos.get_video(request.video_id))
        )

    async def ListVideos(
        self, request: pb.ListVideosRequest, context: Context
    ) -> pb.ListVideosResponse:
        """A page of videos, newest first."""
        records, token = await self._videos.list_videos(request.page_size, request.page_token)
        return pb.ListVideosResponse(
            videos=[self._to_proto(record) for record in records], next_page_token=token
        )

    async def DeleteVideo(
        self, request: pb.DeleteVideoRequest, context: Context
    ) -> pb.DeleteVideoResponse:
        """Remove a video, though not from under the jobs that read it."""
        await self._videos.delete_video(request.video_id)
        return pb.DeleteVideoResponse()

    def _to_proto(self, record: VideoRecord) -> pb.Video:
        message = video_to_proto(record)
        if record.info is not None:
            message.warnings.extend(warnings_to_proto(self._review(record.info.geometry)))
        return message


def _invalid(message: str) -> ServiceError:
    return ServiceError(Reason.INVALID_REQUEST, message)


def warnings_to_proto(warnings: Iterable[VideoWarning]) -> list[pb.VideoWarning]:
    """Warnings as the API shows them."""
    return [pb.VideoWarning(reason=w.reason, message=w.message) for w in warnings]


def video_to_proto(record: VideoRecord) -> pb.Video:
    """A record as the API shows it."""
    message = pb.Video(
        video_id=record.video_id,
        display_name=record.display_name,
        state=f"VIDEO_STATE_{record.state}",
        size_bytes=record.size_bytes,
        committed_bytes=record.committed_bytes,
        sha256=record.sha256,
        create_time=timestamp_to_proto(record.create_time),
        expire_time=timestamp_to_proto(record.expire_time),
        error_reason=record.error_reason,
        error_message=record.error_message,
    )
    if record.info is not None:
        info = record.info
        message.info.CopyFrom(_info_to_proto(info))
        message.warnings.extend(warnings_to_proto(info.warnings))
    return message


def _info_to_proto(info: VideoInfo) -> pb.VideoInfo:
    geometry = info.geometry
    sizes = [pb.FrameSize(width=s.width, height=s.height, frames=s.frames) for s in geometry.sizes]
    numerator, denominator = geometry.sample_aspect_ratio
    return pb.VideoInfo(
        container=info.container,
        codec=info.codec,
        width=geometry.width,
        height=geometry.height,
        frame_count=info.frame_count,
        fps=info.fps,
        duration=duration_to_proto(info.duration_s),
        keyframe_count=info.keyframe_count,
        stored=sizes[0],
        sample_aspect_ratio=pb.SampleAspectRatio(numerator=numerator, denominator=denominator),
        sizes=sizes,
        rotation=geometry.rotation,
        mirrored=geometry.mirrored,
    )
