"""The fake server's AnswerService: answers that break off where a test wants them to."""

from __future__ import annotations

import asyncio

import grpc
from fake_backend import Backend, fail
from fake_jobs import FakeJobs

from prefill.v1 import answer_service_pb2 as apb
from prefill.v1 import answer_service_pb2_grpc as answer_grpc


class FakeAnswers(answer_grpc.AnswerServiceServicer):
    def __init__(self, backend: Backend, jobs: FakeJobs) -> None:
        self._backend = backend
        self._jobs = jobs

    async def Ask(self, request, context):
        state = self._backend.state
        faults = self._backend.faults
        await self._backend.enter("Ask", context)
        state.asks.append(request)
        state.ask_active += 1
        state.ask_peak = max(state.ask_peak, state.ask_active)
        try:
            if faults.queue_full:
                faults.queue_full -= 1
                await fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", "64 jobs")
            await self._check_question(request, context)
            await self._backend.check_ready(request.spec, context)
            job = self._jobs.job_of(request.spec)
            async for update in self._jobs.run(job):
                yield apb.AskResponse(progress=apb.AskProgress(job=update))
            for tokens in faults.intake:
                taken = apb.AskProgress(job=job, computed_tokens=tokens, prompt_tokens=1000)
                yield apb.AskResponse(progress=taken)
            if faults.job_error:
                await fail(context, grpc.StatusCode.UNAVAILABLE, *faults.job_error)
            if faults.ask_break_before:
                faults.ask_break_before -= 1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Connection reset by peer")
            words = answer_words(request)
            if faults.ask_sampled and len(state.asks) > 1:
                words[1] = "wanted: "
            for index, word in enumerate(words):
                if faults.ask_break_after and index == faults.ask_break_after:
                    faults.ask_break_after = 0
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
            await fail(
                context, grpc.StatusCode.INVALID_ARGUMENT, "QUESTION_EMPTY", "the question is empty"
            )
        if len(request.messages[-1].text) > 1000:
            await fail(
                context,
                grpc.StatusCode.INVALID_ARGUMENT,
                "CONTEXT_EXCEEDED",
                "1200 tokens, 1000 fit",
                tokens="1200",
                limit="1000",
            )

    def _final(self, job, words):
        final = apb.AskFinal(
            finish_reason="stop",
            job_id=job.job_id,
            prefix_id="pfx_1",
            usage=apb.AskUsage(prompt_tokens=820, video_tokens=800, completion_tokens=len(words)),
            warnings=self._backend.state.videos[job.spec.video_id].warnings,
            frames=apb.SampledFrames(numbers=[0, 12, 25], seconds=[0.0, 0.48, 1.0]),
        )
        final.timings.total.FromMilliseconds(1250)
        return final


def answer_words(request: apb.AskRequest) -> list[str]:
    """The fake's answer names what it was asked, so that mixed-up answers are seen."""
    limit = request.sampling_params.max_tokens or 256
    return ["You ", "asked: ", *(w + " " for w in request.messages[-1].text.split())][:limit]
