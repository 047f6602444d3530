"""``prefill.v1.PrefillService``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from prefill.v1 import prefill_service_pb2 as pb
from prefill.v1 import prefill_service_pb2_grpc

from prefill_service.api.convert import inspection_to_proto, job_to_proto, spec_from_proto
from prefill_service.api.types import Context
from prefill_service.scheduling.scheduler import Scheduler

_PIECE_BYTES = 256 << 10
_PAGE_BYTES = 2 << 20
"""A page ends early beyond this: clients accept messages of 4 MiB."""


class PrefillServicer(prefill_service_pb2_grpc.PrefillServiceServicer):
    """Jobs over gRPC."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def CreatePrefillJob(
        self, request: pb.CreatePrefillJobRequest, context: Context
    ) -> pb.CreatePrefillJobResponse:
        """Queue a prefill, or find the job that has it."""
        job = await self._scheduler.create(spec_from_proto(request.spec), request.request_id)
        return pb.CreatePrefillJobResponse(job=job_to_proto(job))

    async def GetPrefillJob(
        self, request: pb.GetPrefillJobRequest, context: Context
    ) -> pb.GetPrefillJobResponse:
        """One job."""
        return pb.GetPrefillJobResponse(job=job_to_proto(self._scheduler.jobs.get(request.job_id)))

    async def ListPrefillJobs(
        self, request: pb.ListPrefillJobsRequest, context: Context
    ) -> pb.ListPrefillJobsResponse:
        """Jobs, newest first, without the JSON texts of their results."""
        rows, more = self._scheduler.jobs.page(request.page_size, request.page_token)
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
        """Stop a job."""
        job = await self._scheduler.cancel(request.job_id)
        return pb.CancelPrefillJobResponse(job=job_to_proto(job))

    async def WatchPrefillJob(
        self, request: pb.WatchPrefillJobRequest, context: Context
    ) -> AsyncIterator[pb.WatchPrefillJobResponse]:
        """The job now and at each change."""
        async with aclosing(self._scheduler.watch(request.job_id)) as jobs:
            async for job in jobs:
                yield pb.WatchPrefillJobResponse(job=job_to_proto(job))

    async def InspectPrefillJob(
        self, request: pb.InspectPrefillJobRequest, context: Context
    ) -> pb.InspectPrefillJobResponse:
        """What a job's attention did, in full."""
        return inspection_to_proto(*self._scheduler.jobs.inspect(request.job_id))

    async def TracePrefillJob(
        self, request: pb.TracePrefillJobRequest, context: Context
    ) -> AsyncIterator[pb.TracePrefillJobResponse]:
        """When what was done for a job, in pieces."""
        trace = self._scheduler.jobs.trace(request.job_id)
        for start in range(0, len(trace), _PIECE_BYTES):
            yield pb.TracePrefillJobResponse(data=trace[start : start + _PIECE_BYTES])
