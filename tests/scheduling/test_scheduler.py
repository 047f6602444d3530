"""PrefillService over a socket, and what a restart makes of its jobs."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.budget import KVBudget
from prefill_service.kv.handoff import HandoffParams
from prefill_service.kv.manifest import Manifest
from tests.support.in_process_service import answer, error_of
from tests.support.simulated_backends import FRAME_BYTES, LAYOUT

Serve = Callable[..., Any]


async def test_watch_shows_progress_and_the_result(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        created = await s.create(frames=16)
        assert created.job_id.startswith("job_")
        assert len(created.job_id) == 30
        assert created.prefix_tokens == 256
        jobs = await s.ended(created.job_id)
        assert [job.state for job in jobs][-1] == pb.JOB_STATE_SUCCEEDED
        assert len(jobs) >= 4
        assert {(p.stage, p.rank) for p in jobs[-1].progress} == {
            (stage, rank)
            for stage in (pb.STAGE_DECODE, pb.STAGE_VISION, pb.STAGE_PREFILL)
            for rank in (0, 1)
        }
        job = jobs[-1]
        assert job.attempts == 1
        assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds()
        assert job.start_time.ToNanoseconds() < job.end_time.ToNanoseconds()
        result = job.result
        manifest = Manifest.from_json(result.manifest_json)
        assert manifest.prefix_id == result.prefix_id
        assert (result.prefix_tokens, result.video_tokens, result.frames) == (256, 128, 16)
        assert (result.position_delta, list(result.grid_thw)) == (-3, [8, 8, 8])
        assert [(x.start_token, x.end_token, x.rank) for x in result.shards] == [
            (0, 128, 0),
            (128, 256, 1),
        ]
        assert result.kv_bytes == 16 * FRAME_BYTES
        params = HandoffParams.from_kv_transfer_params(json.loads(result.kv_transfer_params_json))
        assert params is not None
        assert params.manifest == manifest
        assert params.lease_id in s.executor.leases[result.prefix_id]  # usable by anybody's vLLM
        assert (await s.ended(job.job_id))[0] == job


async def test_same_prefix_is_the_same_job(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        first, second = await asyncio.gather(s.create(), s.create())
        assert first.job_id == second.job_id
        await s.ended(first.job_id)
        assert (await s.create()).job_id == first.job_id
        assert (await s.create(frames=10)).job_id != first.job_id


async def test_request_id_is_idempotent(serve: Serve) -> None:
    async with serve() as s:
        key = str(uuid.uuid4())
        first, second = await asyncio.gather(s.create(request_id=key), s.create(request_id=key))
        assert first.job_id == second.job_id
        await s.ended(first.job_id)
        await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=first.job_id))
        s.executor.die()
        assert (await s.create(request_id=key)).state == pb.JOB_STATE_EVICTED
        code, reason, metadata, details = await error_of(s.create(frames=10, request_id=key))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert metadata == {"request_id": key, "job_id": first.job_id}
        assert details == ["ErrorInfo", "RequestInfo"]
        _, reason, metadata, _ = await error_of(s.create(request_id="not-a-uuid"))
        assert (reason, metadata["value"]) == ("INVALID_REQUEST", "not-a-uuid")


async def test_queue_is_first_come_first_served_and_bounded(serve: Serve) -> None:
    async with serve(engine={"max_queued_jobs": 2}) as s:
        s.executor.step_s = 0.2
        jobs = [await s.create(frames=frames) for frames in (4, 6, 8)]
        assert [job.queue_position for job in jobs] == [0, 1, 2]
        code, reason, metadata, details = await error_of(s.create(frames=10))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert metadata == {"queued": "2", "limit": "2"}
        assert "RetryInfo" in details
        _, reason, _, _ = await error_of(answer(s.ask(frames=10)))
        assert reason == "QUEUE_FULL"
        seen = await s.ended(jobs[2].job_id)
        assert [job.queue_position for job in seen if job.state == pb.JOB_STATE_QUEUED][:2] == [
            2,
            1,
        ]
        assert s.executor.started == [job.job_id for job in jobs]


async def test_cancel_queued_running_and_ended(serve: Serve) -> None:
    async with serve() as s:

        async def cancel(job_id: str) -> pb.PrefillJob:
            return (
                await s.prefills.CancelPrefillJob(pb.CancelPrefillJobRequest(job_id=job_id))
            ).job

        s.executor.step_s = 30
        running = await s.create()
        queued = await s.create(frames=10)
        watch = asyncio.create_task(s.ended(queued.job_id))
        await s.until(lambda: bool(s.executor.started))
        job = await cancel(queued.job_id)
        assert (job.state, job.error.reason) == (pb.JOB_STATE_CANCELLED, "CANCELLED")
        assert (await watch)[-1].state == pb.JOB_STATE_CANCELLED
        again = await s.create(frames=10)
        assert again.job_id != queued.job_id
        assert (await cancel(running.job_id)).state == pb.JOB_STATE_CANCELLED
        assert s.executor.stopped == [running.job_id]
        assert s.executor.pages.keys().isdisjoint({job.result.prefix_id})
        s.executor.step_s = 0
        await s.until(lambda: len(s.executor.started) == 2)
        await cancel(again.job_id)
        done = await s.create()
        await s.ended(done.job_id)
        assert (await cancel(done.job_id)).state == pb.JOB_STATE_SUCCEEDED
        assert (await error_of(cancel("job_x")))[1] == "UNKNOWN_JOB"


async def test_rank_death_is_retried_once(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        job = await s.create()
        await s.until(lambda: len(s.executor.started) == 1)
        s.executor.die()
        job = (await s.ended(job.job_id))[-1]
        assert (job.state, job.attempts) == (pb.JOB_STATE_SUCCEEDED, 2)
        other = await s.create(frames=10)
        for attempt in (3, 4):
            await s.until(lambda n=attempt: len(s.executor.started) == n)
            s.executor.die(Reason.RANK_STALLED)
        other = (await s.ended(other.job_id))[-1]
        assert (other.state, other.attempts) == (pb.JOB_STATE_FAILED, 2)
        assert (other.error.reason, dict(other.error.metadata)) == ("RANK_STALLED", {"rank": "1"})
        assert (await s.get(job.job_id)).state == pb.JOB_STATE_EVICTED


async def test_other_failures_are_final_and_free_the_pages(serve: Serve) -> None:
    async with serve() as s:
        s.executor.failures.append(ServiceError(Reason.DECODE_FAILED, "frame 7 is broken", frame=7))
        s.executor.failures.append(ZeroDivisionError("a bug"))  # type: ignore[arg-type]
        job = (await s.ended((await s.create()).job_id))[-1]
        assert (job.state, job.attempts) == (pb.JOB_STATE_FAILED, 1)
        assert (job.error.reason, job.error.metadata["frame"]) == ("DECODE_FAILED", "7")
        job = (await s.ended((await s.create()).job_id))[-1]
        assert job.error.reason == "INTERNAL"
        job = (await s.ended((await s.create()).job_id))[-1]
        assert job.state == pb.JOB_STATE_SUCCEEDED
        assert len(s.executor.pages) == 1


async def test_context_exceeded_says_what_would_fit(serve: Serve) -> None:
    async with serve() as s:
        s.generation.max_model_len = 400
        code, reason, metadata, _ = await error_of(s.create(frames=26))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_EXCEEDED")
        assert metadata == {
            "tokens": "416",
            "limit": "400",
            "advice": "num_frames=18 would fit.",
        }
        assert (await error_of(s.create(frames=10_000)))[1] == "INVALID_REQUEST"
        await s.create(frames=18)


async def test_what_the_ranks_cannot_hold_is_refused_with_advice(serve: Serve) -> None:
    layout = replace(LAYOUT, num_layers=3)  # of which two attend
    frame = 2 * layout.page_bytes // 3
    budget = KVBudget(layout, 1 << 40, working_bytes=10 * frame)
    async with serve(components={"memory": budget}) as s:
        for refused in (s.create(frames=12), answer(s.ask(frames=12))):
            code, reason, metadata, _ = await error_of(refused)
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "KV_POOL_FULL")
            assert metadata["option"] == "engine.kv_working_bytes"
            assert metadata["advice"] == "num_frames=10 would fit."
            assert metadata["needed_bytes"] == str(12 * frame)
        assert s.executor.started == []
        job = await s.create(frames=10)
        assert (await s.ended(job.job_id))[-1].state == pb.JOB_STATE_SUCCEEDED


async def test_least_recently_used_prefix_is_evicted(serve: Serve) -> None:
    async with serve(engine={"kv_pool_bytes": 24 * FRAME_BYTES}) as s:
        a = await s.create(frames=8)
        b = await s.create(frames=10)
        await s.ended(b.job_id)
        await answer(s.ask(frames=8))  # a is now the younger one
        c = await s.create(frames=12)
        await s.ended(c.job_id)
        states = [(await s.get(job.job_id)).state for job in (a, b, c)]
        assert states == [pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_EVICTED, pb.JOB_STATE_SUCCEEDED]
        assert not (await s.get(b.job_id)).HasField("result")
        assert len(s.executor.pages) == 2
        job = (await s.ended((await s.create(frames=26)).job_id))[-1]
        assert job.error.reason == "KV_POOL_FULL"
        assert job.error.metadata["needed_bytes"] == str(26 * FRAME_BYTES)
        assert job.error.metadata["pool_bytes"] == str(24 * FRAME_BYTES)
        assert (await s.get(a.job_id)).state == pb.JOB_STATE_SUCCEEDED  # nothing was lost for it


async def test_leased_prefix_stays_until_its_answer_ends(serve: Serve) -> None:
    async with serve(engine={"kv_pool_bytes": 16 * FRAME_BYTES}) as s:
        s.generation.token_s = 0.2
        reading = asyncio.create_task(answer(s.ask(frames=10)))
        await s.until(lambda: any(event.is_set() for event in s.executor.pages.values()))
        other = await s.create(frames=12)
        await asyncio.sleep(0.2)
        assert (await s.get(other.job_id)).state == pb.JOB_STATE_QUEUED
        assert (await reading).text == "A red car."
        assert (await s.ended(other.job_id))[-1].state == pb.JOB_STATE_SUCCEEDED


async def test_leases_are_renewed(serve: Serve) -> None:
    async with serve(engine={"lease_ttl_s": 0.3}) as s:
        job = await s.create()
        await s.ended(job.job_id)
        s.executor.leases.clear()  # as if they had expired in the ranks
        await s.until(lambda: s.executor.open_leases == 1, timeout=1)


async def test_list_is_newest_first_and_paged(serve: Serve) -> None:
    async with serve() as s:
        ids = [(await s.create(frames=frames)).job_id for frames in (2, 4, 6, 8, 10)]
        await s.ended(ids[-1])
        listed = []
        token = ""
        for size in (2, 2, 1):
            request = pb.ListPrefillJobsRequest(page_size=2, page_token=token)
            page = await s.prefills.ListPrefillJobs(request)
            assert len(page.jobs) == size
            listed += page.jobs
            token = page.next_page_token
        assert token == ""
        assert [job.job_id for job in listed] == ids[::-1]
        assert listed[0].result.prefix_tokens == 160
        assert listed[0].result.manifest_json == ""
        tokens = ["x", "-1", "1" * 5000, "1" * 19]  # int() refuses more than 4,300 digits
        for bad in [{"page_size": -1}, *({"page_token": token} for token in tokens)]:
            request = pb.ListPrefillJobsRequest(**bad)
            assert (await error_of(s.prefills.ListPrefillJobs(request)))[1] == "INVALID_REQUEST"


async def test_restart_resumes_the_queue(serve: Serve) -> None:
    async with serve() as s:
        finished = await s.create(frames=4)
        await s.ended(finished.job_id)
        s.executor.step_s = 30
        running = await s.create(frames=6)
        queued = await s.create(frames=8)
        call = s.ask(frames=10)
        await call.read()
        await s.until(lambda: len(s.executor.started) == 2)
        waited_for = (await s.prefills.ListPrefillJobs(pb.ListPrefillJobsRequest())).jobs[0]
        assert waited_for.state == pb.JOB_STATE_QUEUED
        s.service.shut_down()
        s.service.shut_down()
        await s.task
        assert s.executor.stopped == [running.job_id]
    async with serve() as s:
        assert (await s.get(finished.job_id)).state == pb.JOB_STATE_EVICTED
        assert (await s.get(waited_for.job_id)).state == pb.JOB_STATE_CANCELLED
        for job in (running, queued):
            ended = (await s.ended(job.job_id))[-1]
            assert (ended.state, ended.attempts) == (pb.JOB_STATE_SUCCEEDED, 1)
        assert s.executor.started == [running.job_id, queued.job_id]


async def test_deleted_video_fails_the_queued_job_but_not_the_running_one(serve: Serve) -> None:
    from prefill.v1 import video_service_pb2

    async with serve() as s:
        s.executor.step_s = 0.2
        running = await s.create(frames=4)
        queued = await s.create(frames=6)
        await s.until(lambda: bool(s.executor.started))
        await s.videos.DeleteVideo(video_service_pb2.DeleteVideoRequest(video_id=s.video_id))
        assert (await s.ended(running.job_id))[-1].state == pb.JOB_STATE_SUCCEEDED
        assert (await s.ended(queued.job_id))[-1].error.reason == "UNKNOWN_VIDEO"
        assert (await error_of(s.create()))[1] == "UNKNOWN_VIDEO"


@pytest.mark.parametrize("method", ["get", "ended"])
async def test_unknown_job(serve: Serve, method: str) -> None:
    async with serve() as s:
        code, reason, metadata, _ = await error_of(getattr(s, method)("job_x"))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_JOB")
        assert metadata == {"job_id": "job_x"}
