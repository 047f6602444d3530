"""Ask, end to end over a socket: the flow, its retries, its cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb

from prefill_service.errors import Reason, ServiceError
from prefill_service.kv.handoff import IntakeReport
from prefill_service.kv.handoff_reports import send_report
from tests.support.in_process_service import answer, error_of
from tests.support.simulated_backends import FRAME_BYTES, TOKENS_PER_FRAME

Serve = Callable[..., Any]


async def test_progress_then_tokens_then_final(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        result = await answer(s.ask(frames=16))
        first_delta = result.kinds.index("delta")
        assert set(result.kinds[:first_delta]) == {"progress"}
        assert set(result.kinds[first_delta:-1]) == {"delta"}
        assert result.kinds[-1] == "final"
        states = [prefill_pb.JobState.Name(job.state) for job in result.progress]
        assert states[-1] == "JOB_STATE_SUCCEEDED"
        assert "JOB_STATE_RUNNING" in states
        dones = [sum(stage.done for stage in job.progress) for job in result.progress]
        assert dones == sorted(dones)
        assert dones[-1] == 2 * 2 * 8 + 16 * TOKENS_PER_FRAME  # patches twice, tokens
        assert result.text == "A red car."
        assert result.token_ids == [1, 2, 3, 4]
        final = result.final
        assert final.finish_reason == "stop"
        assert final.usage.prompt_tokens == 16 * 16 + len("What?")
        assert final.usage.completion_tokens == 4
        assert (final.usage.kv_tokens_moved, final.usage.kv_bytes_moved) == (256, 1000)
        assert final.usage.cached_tokens == 7
        assert list(final.frames.numbers) == list(range(16))
        assert list(final.frames.seconds) == [number / 2 for number in range(16)]
        assert final.timings.handoff.ToNanoseconds() == 250_000_000
        assert 0.7 < final.timings.prefill_wait.ToNanoseconds() / 1e9 < 5
        assert final.timings.first_token.ToNanoseconds() <= final.timings.total.ToNanoseconds()


async def test_frames_whose_size_the_index_missed_are_said_in_every_answer(serve: Serve) -> None:
    async with serve(engine={"text_from_tokens": 20}) as s:
        s.executor.unlisted_frames = 3
        first = await answer(s.ask(frames=16))
        request = prefill_pb.GetPrefillJobRequest(job_id=first.final.job_id)
        job = (await s.prefills.GetPrefillJob(request)).job
        assert job.result.unlisted_frames == 3
        assert list(job.result.warnings) == list(first.final.warnings)
        s.executor.unlisted_frames = 0  # of the text that extends the prefix, which has no frames
        later = await answer(s.ask(frames=16, text="What does the robot do after that?"))
        assert len(s.executor.tasks) == 2
        for result in (first, later):
            (warning,) = [w for w in result.final.warnings if w.reason == "SIZE_CHANGES"]
            assert warning.message.startswith("3 of the 16 frames looked at have another size")
        other = await answer(s.ask(frames=8))
        assert not [w for w in other.final.warnings if w.reason == "SIZE_CHANGES"]


@pytest.mark.parametrize("by", prefill_pb.SampleBy.values())
async def test_what_is_evenly_spaced_is_part_of_the_job(
    serve: Serve, by: prefill_pb.SampleBy
) -> None:
    async with serve() as s:
        spec = s.spec()
        spec.sampling.by = by
        job = (await s.prefills.CreatePrefillJob(prefill_pb.CreatePrefillJobRequest(spec=spec))).job
        assert job.spec.sampling.by == by
        again = await s.create()
        assert (again.job_id == job.job_id) == (by == prefill_pb.SAMPLE_BY_UNSPECIFIED)


async def test_a_spacing_that_is_not_known_is_refused(serve: Serve) -> None:
    async with serve() as s:
        spec = s.spec()
        spec.sampling.by = 7  # type: ignore[assignment]
        call = s.prefills.CreatePrefillJob(prefill_pb.CreatePrefillJobRequest(spec=spec))
        code, reason, metadata, _ = await error_of(call)
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        assert (metadata["name"], metadata["value"]) == ("spec.sampling.by", "7")


async def test_the_question_goes_to_vllm_while_the_ranks_work(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        call = s.ask(frames=16)
        reading = asyncio.create_task(answer(call))
        await s.until(lambda: bool(s.generation.requests))
        assert not s.executor.pages[s.generation.requests[0].handoff.manifest.prefix_id].is_set()
        await reading
        assert s.executor.open_leases == 1  # the standing one


async def test_two_asks_on_one_prefix_prefill_once(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.05
        both = await asyncio.gather(answer(s.ask()), answer(s.ask(text="And then?")))
        third = await answer(s.ask(text="Why?"))
        assert len(s.executor.started) == 1
        assert {result.final.job_id for result in (*both, third)} == set(s.executor.started)
        assert third.final.timings.prefill_wait.ToNanoseconds() == 0
        assert both[0].final.timings.prefill_wait.ToNanoseconds() > 0


async def test_progress_says_how_much_of_the_prompt_vllm_has(serve: Serve) -> None:
    async with serve() as s:
        s.generation.token_s = 30
        call = s.ask()
        await s.until(lambda: bool(s.generation.requests))
        handoff = s.generation.requests[0].handoff
        for computed in (100, 120):
            report = IntakeReport(handoff.lease_id, computed, 133)
            await asyncio.to_thread(send_report, handoff.report_to, report)
            async for message in call:
                progress = message.progress
                if progress.computed_tokens == computed:
                    break
            assert progress.prompt_tokens == 133
            assert s.generation.requests[0].last_sign() > 0
        call.cancel()


async def test_a_long_question_is_computed_on_the_ranks_of_its_video(serve: Serve) -> None:
    async with serve(engine={"text_from_tokens": 20}) as s:
        s.executor.step_s = 0.05
        text = "What does the robot do after it has opened the door?"
        result = await answer(s.ask(frames=16, text=text))
        video, question = s.executor.tasks
        assert question.base is video.manifest
        assert question.subgroup == video.subgroup
        before = 16 * TOKENS_PER_FRAME
        assert question.manifest.start_token == video.plan.num_tokens == before
        assert question.plan.num_tokens == before + len(text) - 1
        assert question.plan.token_ids[before:].tolist() == [ord(c) for c in text[:-1]]
        delta = video.plan.position_delta
        assert (question.plan.position_ids[:, before] == before + delta).all()
        handoff = s.generation.requests[0].handoff
        assert handoff.manifest == question.manifest
        assert handoff.base.manifest == video.manifest
        assert s.generation.requests[0].plan.prefix_id == video.plan.prefix_id
        # both jobs report their progress, one after the other
        jobs = list(dict.fromkeys(job.job_id for job in result.progress))
        assert jobs == [video.job_id, question.job_id]
        assert result.final.job_id == video.job_id
        assert s.executor.open_leases == 2  # the standing ones

        # What is there is used again, also by a chat that goes on; a short question needs none.
        await answer(s.ask(frames=16, text=text))
        await answer(s.ask(frames=16, text=text + " And then?"))
        assert [r.handoff.manifest for r in s.generation.requests[1:]] == 2 * [question.manifest]
        await answer(s.ask(frames=16, text="Why?"))
        assert s.generation.requests[-1].handoff.base is None
        assert len(s.executor.tasks) == 2


@pytest.mark.parametrize("fault", ["failed", "no room"])
async def test_a_text_that_the_ranks_cannot_compute_is_left_to_vllm(
    serve: Serve, fault: str
) -> None:
    engine = {"text_from_tokens": 20}
    if fault == "no room":
        engine["kv_pool_bytes"] = 8 * FRAME_BYTES
    async with serve(engine=engine) as s:
        assert (await answer(s.ask(text="Why?"))).text == "A red car."
        if fault == "failed":
            s.executor.failures.append(ServiceError(Reason.PREFILL_FAILED, "out of memory"))
        result = await answer(s.ask(text="What does the robot do after that?"))
        assert result.text == "A red car."
        assert s.generation.requests[-1].handoff.base is None
        assert len(s.executor.tasks) == 1
        assert s.executor.open_leases == 1


async def test_a_video_outlives_the_text_that_extends_it(serve: Serve) -> None:
    """Room for another video is made by dropping the text; with its video, the text goes."""
    text = "What does the robot do after it has opened the door?"
    engine = {"text_from_tokens": 20, "kv_pool_bytes": 20 * FRAME_BYTES}
    async with serve(engine=engine) as s:
        await answer(s.ask(frames=8, text=text))
        video, question = s.executor.tasks
        await answer(s.ask(frames=10))
        assert video.plan.prefix_id in s.executor.pages
        assert question.plan.prefix_id not in s.executor.pages
        await answer(s.ask(frames=8, text=text))
        again = s.executor.tasks[-1]
        assert again.base == video.manifest
        await answer(s.ask(frames=18))
        assert not {video.plan.prefix_id, question.plan.prefix_id} & s.executor.pages.keys()
        assert s.executor.open_leases == 1


async def test_a_question_beyond_the_configured_length_costs_nothing(serve: Serve) -> None:
    async with serve(vllm={"max_question_tokens": 5}) as s:
        assert (await answer(s.ask(text="Why??"))).text == "A red car."
        started = len(s.executor.started)
        code, reason, metadata, _ = await error_of(answer(s.ask(frames=10, text="Why???")))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "QUESTION_TOO_LONG")
        assert (metadata["tokens"], metadata["limit"]) == ("6", "5")
        jobs = (await s.prefills.ListPrefillJobs(prefill_pb.ListPrefillJobsRequest())).jobs
        assert len(s.executor.started) == len(jobs) == started


@pytest.mark.parametrize("stage", ["queued", "running", "handing over", "streaming"])
async def test_client_gone_stops_everything(serve: Serve, stage: str) -> None:
    async with serve() as s:
        blocker = None
        if stage == "queued":
            s.executor.step_s = 3600
            blocker = await s.create(frames=16)  # not so long that it would be preempted
            await s.until(lambda: bool(s.executor.started))
        elif stage in ("running", "handing over"):
            s.executor.step_s = 3600
        else:
            s.generation.token_s = 0.05
            s.generation.answer = ["la "] * 1000
        call = s.ask(max_tokens=1000)
        async for message in call:
            state = message.progress.job.state
            if stage == "queued" and state == prefill_pb.JOB_STATE_QUEUED:
                break
            if stage == "running" and state == prefill_pb.JOB_STATE_RUNNING:
                break
            if stage == "handing over" and s.generation.requests:
                break
            if stage == "streaming" and message.HasField("delta"):
                break
            if stage == "handing over" and state == prefill_pb.JOB_STATE_RUNNING:
                await s.until(lambda: bool(s.generation.requests))
                break
        jobs = (await s.prefills.ListPrefillJobs(prefill_pb.ListPrefillJobsRequest())).jobs
        call.cancel()
        resident = 1 if stage == "streaming" else 0
        await s.until(
            lambda: (
                s.executor.open_leases == resident
                and len(s.generation.aborted) == len(s.generation.requests)
                and len(s.executor.stopped) == (stage in ("running", "handing over"))
            )
        )
        (*_, job) = await s.ended(jobs[0].job_id)  # its ranks stop before that is written down
        assert job.state == (
            prefill_pb.JOB_STATE_SUCCEEDED
            if stage == "streaming"
            else prefill_pb.JOB_STATE_CANCELLED
        )
        if blocker:
            assert (await s.get(blocker.job_id)).state == prefill_pb.JOB_STATE_RUNNING


async def test_the_work_goes_on_for_those_who_still_wait(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.15
        leaving = s.ask()
        staying = asyncio.create_task(answer(s.ask(text="Why?")))
        await leaving.read()
        await s.until(lambda: len(s.generation.requests) == 2)
        leaving.cancel()
        assert (await staying).text == "A red car."
        assert s.executor.stopped == []
        # and a job that somebody created explicitly survives all its callers
        s.executor.step_s = 0.1
        call = s.ask(frames=10)
        await call.read()
        job = await s.create(frames=10)
        call.cancel()
        assert (await s.ended(job.job_id))[-1].state == prefill_pb.JOB_STATE_SUCCEEDED


async def test_deadline_stops_the_ranks(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 30
        code, *_ = await error_of(answer(s.ask(timeout=0.5)))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await s.until(lambda: len(s.executor.stopped) == 1, timeout=1)
        assert s.executor.open_leases == 0


@pytest.mark.parametrize(
    "reason",
    [
        Reason.LEASE_EXPIRED,
        Reason.STALE_GENERATION,
        Reason.UNKNOWN_PREFIX,
        Reason.KV_CORRUPT,
        Reason.HANDOFF_FAILED,
    ],
)
async def test_failed_handoff_is_tried_once_more(serve: Serve, reason: Reason) -> None:
    async with serve() as s:
        await answer(s.ask())
        s.generation.faults.append(ServiceError(reason, "broken"))
        result = await answer(s.ask())
        assert result.text == "A red car."
        leases = [request.handoff.lease_id for request in s.generation.requests]
        assert len(set(leases)) == 3
        again = reason not in (Reason.LEASE_EXPIRED, Reason.HANDOFF_FAILED)
        assert len(s.executor.started) == 1 + again
        assert s.executor.open_leases == 1
        s.generation.faults.extend([ServiceError(reason, "broken", page=3)] * 2)
        code, found, metadata, _ = await error_of(answer(s.ask()))
        assert (found, metadata) == (reason, {"page": "3"})
        assert code.name == ServiceError(reason, "").status
        assert s.executor.open_leases == 1
        assert (await answer(s.ask())).text == "A red car."


async def test_mismatch_is_not_tried_again(serve: Serve) -> None:
    async with serve() as s:
        s.generation.faults.append(ServiceError(Reason.KV_MISMATCH, "another dtype"))
        _, found, _, _ = await error_of(answer(s.ask()))
        assert found == Reason.KV_MISMATCH
        assert len(s.generation.requests) == 1


async def test_failed_job_explains_the_failed_handoff(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.3
        s.executor.failures.append(ServiceError(Reason.DECODE_FAILED, "frame 7 is broken"))
        s.generation.faults.append(ServiceError(Reason.HANDOFF_FAILED, "the ranks hung up"))
        code, reason, _, _ = await error_of(answer(s.ask()))
        assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DECODE_FAILED")
        assert len(s.executor.started) == 1


async def test_rank_death_during_prefill_is_survived(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 0.1
        reading = asyncio.create_task(answer(s.ask()))
        await s.until(lambda: bool(s.generation.requests))
        s.executor.die()
        result = await reading
        assert result.text == "A red car."
        assert result.progress[-1].attempts == 2
        epochs = [request.handoff.manifest.epoch for request in s.generation.requests]
        assert epochs == [0, 1]
        assert len(s.generation.aborted) == 1


async def test_second_rank_death_is_the_answers_error(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 60  # no prefill ends before the death
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: len(s.executor.started) == 1)
        s.executor.die()
        await s.until(lambda: len(s.executor.started) == 2)
        s.executor.die(Reason.RANK_STALLED)
        code, reason, metadata, details = await reading
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "RANK_STALLED")
        assert metadata == {"rank": "1"}
        assert details == ["ErrorInfo", "RetryInfo"]
        s.executor.step_s = 0
        assert (await answer(s.ask())).text == "A red car."


async def test_rank_death_after_the_handoff_does_not_matter(serve: Serve) -> None:
    async with serve() as s:
        s.generation.token_s = 0.1
        call = s.ask()
        messages = []
        async for message in call:
            messages.append(message)
            if message.HasField("delta") and s.executor.ready and s.executor.epoch == 0:
                s.executor.die()
        assert "".join(message.delta.text for message in messages) == "A red car."
        job_id = messages[-1].final.job_id
        assert (await s.get(job_id)).state == prefill_pb.JOB_STATE_EVICTED
        assert (await answer(s.ask())).final.job_id != job_id


async def test_decoder_death_before_the_first_token_is_survived(serve: Serve) -> None:
    async with serve() as s:
        s.generation.token_s = 0.3
        reading = asyncio.create_task(answer(s.ask()))
        await s.until(lambda: bool(s.generation.requests) and bool(s.executor.pages))
        s.generation.die()
        await asyncio.sleep(0.5)
        s.generation.come_up()
        s.generation.token_s = 0
        assert (await reading).text == "A red car."
        assert len(s.executor.started) == 1
        assert len(s.generation.requests) == 2


async def test_decoder_death_in_mid_answer_is_an_error(serve: Serve) -> None:
    async with serve() as s:
        s.generation.token_s = 0.1
        text = ""

        async def read() -> None:
            nonlocal text
            async for message in s.ask():
                text += message.delta.text
                if message.HasField("delta") and s.generation.ready:
                    s.generation.die()

        code, reason, _, _ = await error_of(read())
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DECODER_UNAVAILABLE")
        assert text == "A"
        assert s.executor.open_leases == 1


async def test_bad_questions(serve: Serve) -> None:
    async with serve() as s:

        async def reason(**arguments: Any) -> tuple[str, dict[str, str]]:
            return (await error_of(answer(s.ask(**arguments))))[1:3]

        assert (await reason(text="  "))[0] == "QUESTION_EMPTY"
        found, metadata = await reason(text="x" * 4000)
        assert found == "QUESTION_TOO_LONG"
        assert metadata == {"tokens": "4000", "limit": "3968"}
        found, metadata = await reason(max_tokens=4000)
        assert (found, metadata["max_tokens"]) == ("QUESTION_TOO_LONG", "4000")
        found, metadata = await reason(frames=60, max_tokens=0)
        assert (found, metadata["name"]) == ("INVALID_REQUEST", "sampling_params.max_tokens")
        assert (await reason(temperature=-1))[0] == "INVALID_REQUEST"
        assert (await reason(temperature=float("nan")))[0] == "INVALID_REQUEST"
        assert (await reason(stop=[""]))[0] == "INVALID_REQUEST"
        assert (await error_of(answer(s.answers.Ask(answer_pb.AskRequest()))))[1] == (
            "INVALID_REQUEST"
        )
        no_role = answer_pb.AskRequest(
            spec=s.spec(), messages=[answer_pb.ChatMessage(text="What?")]
        )
        assert (await error_of(answer(s.answers.Ask(no_role))))[2]["name"] == "messages[0].role"
        s.video_id = "vid_nothing"
        assert (await reason())[0] == "UNKNOWN_VIDEO"
        assert s.executor.started == []


async def test_default_max_tokens_shrinks_to_the_room_there_is(serve: Serve) -> None:
    async with serve() as s:
        prompt = 8 * 16 + 3900
        await answer(s.ask(text="x" * 3900))
        await answer(s.ask())
        given = [request.sampling.max_tokens for request in s.generation.requests]
        assert given == [4096 - prompt, 256]


async def test_cancelling_the_job_ends_the_answers_that_wait_for_it(serve: Serve) -> None:
    async with serve() as s:
        s.executor.step_s = 30
        reading = asyncio.create_task(error_of(answer(s.ask())))
        await s.until(lambda: bool(s.generation.requests))
        request = prefill_pb.CancelPrefillJobRequest(job_id=s.executor.started[0])
        job = (await s.prefills.CancelPrefillJob(request)).job
        assert job.state == prefill_pb.JOB_STATE_CANCELLED
        code, reason, _, _ = await reading
        assert (code, reason) == (grpc.StatusCode.CANCELLED, "CANCELLED")
        assert s.executor.open_leases == 0


async def test_client_that_does_not_read_holds_nothing_once_it_is_gone(serve: Serve) -> None:
    async with serve() as s:
        s.generation.answer = ["x" * 60_000] * 1000
        call = s.ask(max_tokens=1000)
        await s.until(lambda: bool(s.generation.requests))
        await asyncio.sleep(0.5)  # the server is now blocked by flow control
        assert s.generation.aborted == []
        call.cancel()
        await s.until(
            lambda: s.executor.open_leases == 1 and len(s.generation.aborted) == 1, timeout=1
        )
