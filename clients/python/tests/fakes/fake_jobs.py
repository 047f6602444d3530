"""The fake server's PrefillService: jobs that two ranks take to their end, reports and traces."""

from __future__ import annotations

import asyncio
import json
import uuid

import grpc
from fake_backend import Backend, fail, new_id, page_of

from prefill.v1 import prefill_service_pb2 as ppb
from prefill.v1 import prefill_service_pb2_grpc as prefill_grpc

STAGE_UNITS = ((ppb.STAGE_DECODE, 8), (ppb.STAGE_VISION, 4), (ppb.STAGE_PREFILL, 400))


class FakeJobs(prefill_grpc.PrefillServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def job_of(self, spec):
        state = self._backend.state
        key = spec.SerializeToString(deterministic=True)
        if key not in state.prefixes:
            job = ppb.PrefillJob(job_id=new_id("job_"), spec=spec, state=ppb.JOB_STATE_QUEUED)
            job.create_time.GetCurrentTime()
            state.jobs[job.job_id] = job
            state.prefixes[key] = job.job_id
        return state.jobs[state.prefixes[key]]

    async def run(self, job):
        """Yields the job at each change, as two ranks take it to its end."""
        yield job
        if job.state != ppb.JOB_STATE_QUEUED:
            return
        self._backend.state.prefills += 1
        job.state = ppb.JOB_STATE_RUNNING
        for stage, total in STAGE_UNITS:
            for rank in range(2):
                entry = job.progress.add(stage=stage, rank=rank, total=total)
                entry.elapsed.FromMilliseconds(1500)
            for _ in range(2):
                await asyncio.sleep(self._backend.faults.prefill_delay_s)
                if job.state == ppb.JOB_STATE_CANCELLED:
                    yield job
                    return
                for entry in job.progress:
                    if entry.stage == stage:
                        entry.done += total // 2
                yield job
        if self._backend.faults.job_error:
            job.state = ppb.JOB_STATE_FAILED
            job.error.reason, job.error.message = self._backend.faults.job_error
        else:
            job.state = ppb.JOB_STATE_SUCCEEDED
            job.prefix_tokens = 810
            job.result.CopyFrom(
                ppb.PrefillResult(
                    prefix_id="pfx_1",
                    prefix_tokens=810,
                    video_tokens=800,
                    grid_thw=[4, 20, 20],
                    shards=[ppb.ShardRange(start_token=0, end_token=810, rank=1)],
                    attention=attention_report(job.spec.attention),
                    warnings=self._backend.state.videos[job.spec.video_id].warnings,
                    unlisted_frames=1,
                )
            )
        yield job

    async def _known(self, job_id, context):
        if job_id not in self._backend.state.jobs:
            await fail(context, grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB", f"no job {job_id!r}")
        return self._backend.state.jobs[job_id]

    async def CreatePrefillJob(self, request, context):
        await self._backend.enter("CreatePrefillJob", context)
        await self._backend.check_ready(request.spec, context)
        assert uuid.UUID(request.request_id).version == 4
        job = self.job_of(request.spec)
        self._backend.state.job_requests[request.request_id] = job.job_id
        await self._backend.leave("CreatePrefillJob", context)
        return ppb.CreatePrefillJobResponse(job=job)

    async def GetPrefillJob(self, request, context):
        await self._backend.enter("GetPrefillJob", context)
        return ppb.GetPrefillJobResponse(job=await self._known(request.job_id, context))

    async def ListPrefillJobs(self, request, context):
        await self._backend.enter("ListPrefillJobs", context)
        page, token = page_of(list(self._backend.state.jobs.values()), request)
        return ppb.ListPrefillJobsResponse(jobs=page, next_page_token=token)

    async def CancelPrefillJob(self, request, context):
        await self._backend.enter("CancelPrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state in (ppb.JOB_STATE_QUEUED, ppb.JOB_STATE_RUNNING):
            job.state = ppb.JOB_STATE_CANCELLED
        return ppb.CancelPrefillJobResponse(job=job)

    async def WatchPrefillJob(self, request, context):
        await self._backend.enter("WatchPrefillJob", context)
        job = await self._known(request.job_id, context)
        async for update in self.run(job):
            yield ppb.WatchPrefillJobResponse(job=update)
            if self._backend.faults.watch_break:
                self._backend.faults.watch_break -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")

    async def InspectPrefillJob(self, request, context):
        await self._backend.enter("InspectPrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state != ppb.JOB_STATE_SUCCEEDED:
            await fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_ATTENTION_REPORT",
                f"job {job.job_id} has no attention report",
            )
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
        await self._backend.enter("TracePrefillJob", context)
        job = await self._known(request.job_id, context)
        if job.state != ppb.JOB_STATE_SUCCEEDED:
            await fail(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "NO_TRACE",
                f"job {job.job_id} has no trace",
            )
        text = json.dumps(
            {"traceEvents": [{"ph": "X", "name": "naïve"}, {"ph": "M"}]}, ensure_ascii=False
        )
        data = text.encode()
        for start in range(0, len(data), 7):  # also through the middle of a character
            yield ppb.TracePrefillJobResponse(data=data[start : start + 7])
            if self._backend.faults.trace_break:
                self._backend.faults.trace_break -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")


def attention_report(spec: ppb.AttentionSpec) -> ppb.AttentionReport:
    """Exact where that was asked for; else two layers of two KV heads."""
    if spec.quality == ppb.QUALITY_EXACT:
        exact = ppb.AttentionMeasures(density=1, kept_mass_mean=1, kept_mass_p5=1, kept_mass_min=1)
        return ppb.AttentionReport(
            quality=ppb.QUALITY_EXACT, min_kept_mass=1, floor_met=True, total=exact
        )
    measures = ppb.AttentionMeasures(
        density=0.25,
        sampled_rows=64,
        kept_mass_mean=0.95,
        kept_mass_p5=0.875,
        kept_mass_min=0.75,
        output_error_mean=0.03125,
        output_error_p95=0.0625,
        tiles=40,
        tiles_redone=4,
        tiles_dense=1,
    )
    measures.attend.FromMilliseconds(1500)
    return ppb.AttentionReport(
        quality=spec.quality or ppb.QUALITY_BALANCED,
        epsilon=0.1,
        min_kept_mass=0.8,
        floor_met=True,
        sparse_from_tokens=512,
        total=measures,
        layers=[
            ppb.LayerAttention(layer=n, measures=measures, head_density=[0.375, 0.125])
            for n in range(2)
        ],
    )
