"""``prefill.v1.PrefillService``, for prefill jobs: created, watched, inspected, cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from prefill.v1 import prefill_service_pb2 as pb
from prefill.v1 import prefill_service_pb2_grpc
from typing_extensions import override

from prefill_service.api.attention_messages import (
    attention_to_proto,
    block_map_to_proto,
    comparison_from_proto,
    comparison_to_proto,
    policy_from_proto,
    policy_to_proto,
)
from prefill_service.api.optional_fields import optional_field
from prefill_service.api.servicer import Context, Servicer
from prefill_service.api.time_messages import duration_to_proto, timestamp_to_proto
from prefill_service.api.video_service import warnings_to_proto
from prefill_service.engine.messages import Progress
from prefill_service.models.prefix_plan import FrameSampling, SampleBy
from prefill_service.scheduling.attention_summary import AttentionDetail
from prefill_service.scheduling.job import NO_POLICY, JobRecord, PrefillResult, PrefillSpec
from prefill_service.scheduling.scheduler import Scheduler

_PIECE_BYTES = 256 << 10
_SAMPLE_BY = {
    pb.SAMPLE_BY_UNSPECIFIED: None,
    pb.SAMPLE_BY_FRAME: SampleBy.FRAME,
    pb.SAMPLE_BY_TIME: SampleBy.TIME,
}
_PAGE_BYTES = 2 << 20
"""A page ends early beyond this: clients accept messages of 4 MiB."""


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer, Servicer):
    """Prefill jobs over gRPC."""

    service_name = pb.DESCRIPTOR.services_by_name["PrefillService"].full_name

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._jobs = scheduler.jobs

    @override
    def register_handlers(self, server: grpc.aio.Server) -> None:
        prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def CreatePrefillJob(
        self, request: pb.CreatePrefillJobRequest, context: Context
    ) -> pb.CreatePrefillJobResponse:
        """Queue a prefill, or find the job that has it."""
        job = await self._scheduler.create_job(spec_from_proto(request.spec), request.request_id)
        return pb.CreatePrefillJobResponse(job=job_to_proto(job))

    async def GetPrefillJob(
        self, request: pb.GetPrefillJobRequest, context: Context
    ) -> pb.GetPrefillJobResponse:
        """A job, with its whole result."""
        return pb.GetPrefillJobResponse(job=job_to_proto(self._jobs.get_record(request.job_id)))

    async def ListPrefillJobs(
        self, request: pb.ListPrefillJobsRequest, context: Context
    ) -> pb.ListPrefillJobsResponse:
        """Jobs, newest first, without the JSON texts of their results."""
        rows, more = self._jobs.list_records(request.page_size, request.page_token)
        response = pb.ListPrefillJobsResponse()
        size = 0
        for number, (token, job) in enumerate(rows, start=1):
            message = job_to_proto(job, brief=True)
            response.jobs.append(message)
            size += message.ByteSize()
            full = size > _PAGE_BYTES
            if full or number == len(rows):
                response.next_page_token = token if more or number < len(rows) else ""
                break
        return response

    async def CancelPrefillJob(
        self, request: pb.CancelPrefillJobRequest, context: Context
    ) -> pb.CancelPrefillJobResponse:
        """Stop a job; answers when the ranks have."""
        job = await self._scheduler.cancel_job(request.job_id)
        return pb.CancelPrefillJobResponse(job=job_to_proto(job))

    async def WatchPrefillJob(
        self, request: pb.WatchPrefillJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchPrefillJobResponse]:
        """Stream the job as it is and at each change, until it ends."""
        async with aclosing(self._scheduler.watch_job(request.job_id)) as jobs:
            async for job in jobs:
                yield pb.WatchPrefillJobResponse(job=job_to_proto(job))

    async def InspectPrefillJob(
        self, request: pb.InspectPrefillJobRequest, context: Context
    ) -> pb.InspectPrefillJobResponse:
        """A job's attention report, with its block map and the mass of each patch."""
        return inspection_to_proto(*self._jobs.get_report(request.job_id))

    async def TracePrefillJob(
        self, request: pb.TracePrefillJobRequest, context: Context
    ) -> AsyncIterator[pb.TracePrefillJobResponse]:
        """Stream a job's trace as JSON text, in pieces."""
        trace = self._jobs.render_trace(request.job_id)
        for start in range(0, len(trace), _PIECE_BYTES):
            yield pb.TracePrefillJobResponse(data=trace[start : start + _PIECE_BYTES])


def spec_from_proto(message: pb.PrefillSpec, question: str = "") -> PrefillSpec:
    """The spec of a request; whether the values of its sampling fit is for the planner to say.

    Args:
        message: the request's spec.
        question: the question that is asked with it, if any.

    Raises:
        ServiceError: INVALID_REQUEST for an attention that cannot be; what
            ``comparison_from_proto`` raises.
    """
    sampling = message.sampling
    comparison = comparison_from_proto(message, question)
    return PrefillSpec(
        video_id=message.video_id,
        sampling=FrameSampling(
            fps=optional_field(sampling, "fps"),
            num_frames=optional_field(sampling, "num_frames"),
            max_pixels=optional_field(sampling, "max_pixels"),
            min_pixels=optional_field(sampling, "min_pixels"),
            cap_pixels_per_frame=optional_field(sampling, "cap_pixels_per_frame"),
            max_frames=optional_field(sampling, "max_frames"),
            square_pixels=optional_field(sampling, "square_pixels"),
            by=_SAMPLE_BY[sampling.by],
        ),
        system_prompt=message.system_prompt,
        attention=policy_from_proto(message.attention) if comparison is None else NO_POLICY,
        comparison=comparison,
    )


def _sampling_to_proto(sampling: FrameSampling) -> pb.FrameSampling:
    message = pb.FrameSampling(
        fps=sampling.fps,
        num_frames=sampling.num_frames,
        max_pixels=sampling.max_pixels,
        min_pixels=sampling.min_pixels,
        max_frames=sampling.max_frames,
        by=f"SAMPLE_BY_{sampling.by or 'UNSPECIFIED'}",
    )
    if sampling.cap_pixels_per_frame is not None:
        message.cap_pixels_per_frame = sampling.cap_pixels_per_frame
    if sampling.square_pixels is not None:
        message.square_pixels = sampling.square_pixels
    return message


def _spec_to_proto(spec: PrefillSpec) -> pb.PrefillSpec:
    return pb.PrefillSpec(
        video_id=spec.video_id,
        sampling=_sampling_to_proto(spec.sampling),
        system_prompt=spec.system_prompt,
        attention=policy_to_proto(spec.attention) if spec.comparison is None else None,
        comparison=comparison_to_proto(spec.comparison) if spec.comparison else None,
    )


def job_to_proto(job: JobRecord, brief: bool = False) -> pb.PrefillJob:
    """A job; ``brief`` leaves out its result's two JSON texts and the layers of the report."""
    message = pb.PrefillJob(
        job_id=job.job_id,
        spec=_spec_to_proto(job.spec),
        state=f"JOB_STATE_{job.state}",
        progress=[_progress_to_proto(progress) for progress in job.progress],
        attempts=job.attempts,
        queue_position=job.queue_position,
        create_time=timestamp_to_proto(job.create_time),
        start_time=timestamp_to_proto(job.start_time),
        end_time=timestamp_to_proto(job.end_time),
        prefix_tokens=job.prefix_tokens,
    )
    if job.error is not None:
        message.error.CopyFrom(pb.JobError(**job.error))
    if job.result is not None:
        message.result.CopyFrom(_result_to_proto(job.result, brief))
    return message


def inspection_to_proto(job: JobRecord, detail: AttentionDetail) -> pb.InspectPrefillJobResponse:
    """A job and its attention report, with block map and patches."""
    return pb.InspectPrefillJobResponse(
        job=job_to_proto(job, brief=True),
        attention=attention_to_proto(detail.summary),
        block_map=block_map_to_proto(detail.block_map) if detail.block_map else None,
        patches=[
            pb.PatchAttention(time=duration_to_proto(second), mass=mass)
            for second, mass in detail.patches
        ],
    )


def _progress_to_proto(progress: Progress) -> pb.StageProgress:
    return pb.StageProgress(
        stage=f"STAGE_{progress.stage.name}",
        rank=progress.rank,
        done=progress.done,
        total=progress.total,
        elapsed=duration_to_proto(progress.elapsed_s),
    )


def _result_to_proto(result: PrefillResult, brief: bool) -> pb.PrefillResult:
    return pb.PrefillResult(
        prefix_id=result.prefix_id,
        prefix_tokens=result.prefix_tokens,
        video_tokens=result.video_tokens,
        frames=result.frames,
        grid_thw=result.grid_thw,
        position_delta=result.position_delta,
        shards=[
            pb.ShardRange(start_token=start, end_token=end, rank=rank)
            for start, end, rank in result.shards
        ],
        kv_bytes=result.kv_bytes,
        kv_transfer_params_json="" if brief else result.kv_transfer_params_json,
        manifest_json="" if brief else result.manifest_json,
        attention=attention_to_proto(result.attention, brief) if result.attention else None,
        communication=_communication_to_proto(result) if result.exchange else None,
        warnings=warnings_to_proto(result.warnings),
        unlisted_frames=result.unlisted_frames,
    )


def _communication_to_proto(result: PrefillResult) -> pb.CommunicationReport:
    return pb.CommunicationReport(
        exchange=result.exchange,
        collectives=[
            pb.CollectiveUse(
                name=name,
                calls=use.calls,
                bytes_received=use.bytes_received,
                elapsed=duration_to_proto(use.seconds),
            )
            for name, use in sorted(result.communication.items())
        ],
    )
