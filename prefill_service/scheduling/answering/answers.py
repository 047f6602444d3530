"""The flow of one answer: plan, prefix, lease, hand-off, tokens; and what is tried again.

On GPUs the question goes to vLLM as soon as the ranks have started: pages are pulled while later
chunks are computed, and only the last one is left to move at the end. On a CPU it waits for the
job's end: vLLM's engine spins while a load is outstanding (measured: 0.9 of a core), which the
ranks need more than the few milliseconds that moving everything at the end takes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Container
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Any

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import GenerationEvent, GenerationRequest
from prefill_service.kv.handoff import HandoffParams, LeasedPages
from prefill_service.kv.handoff_reports import ReportServer
from prefill_service.scheduling.admission import Admission, fit_sampling
from prefill_service.scheduling.answering.answer_events import (
    AnswerDelta,
    AnswerEvent,
    AnswerFinal,
    AnswerProgress,
    Question,
)
from prefill_service.scheduling.answering.answer_state import AnswerState
from prefill_service.scheduling.answering.text_on_ranks import TextOnRanks
from prefill_service.scheduling.job import ACTIVE, Job, JobState
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.prefix_cache import Lease
from prefill_service.scheduling.scheduler import Scheduler
from prefill_service.scheduling.traces import QUESTIONS

if TYPE_CHECKING:
    from prefill_service.generation.server import GenerationServer

logger = logging.getLogger(__name__)

HANDOFF_REASONS = frozenset(
    {
        Reason.LEASE_EXPIRED,
        Reason.STALE_GENERATION,
        Reason.UNKNOWN_PREFIX,
        Reason.KV_CORRUPT,
        Reason.HANDOFF_FAILED,
    }
)
"""Failures of a hand-off that another one may cure."""

BAD_PAGES = frozenset({Reason.STALE_GENERATION, Reason.UNKNOWN_PREFIX, Reason.KV_CORRUPT})
"""Those of them that only computing the prefix again can cure."""

RETRY_PAUSE_S = 0.5
"""Long enough for the supervisor to notice the death of a worker that broke a hand-off."""

VLLM_NOTICE_S = 8.0
"""Longer than the generation server's watcher takes to notice a dead vLLM."""

REPORT_WAIT_S = 1.0
"""How long to wait for the report that explains a failed answer."""


class Answers:
    """Finds or starts the prefix of a question, hands it to vLLM, and streams what it answers.

    Args:
        vllm_wait_s: how long an answer waits for a vLLM that is starting.
        submit_early: whether to submit while the ranks compute (module docstring).
        metrics: counts each completed answer.
    """

    def __init__(
        self,
        admission: Admission,
        scheduler: Scheduler,
        generation: GenerationServer,
        reports: ReportServer,
        *,
        vllm_wait_s: float,
        submit_early: bool,
        metrics: Metrics,
    ) -> None:
        self._admission = admission
        self._scheduler = scheduler
        self._jobs = scheduler.jobs
        self._prefixes = scheduler.prefixes
        self._traces = scheduler.traces
        self._generation = generation
        self._reports = reports
        self._vllm_wait_s = vllm_wait_s
        self._text = TextOnRanks(scheduler)
        self._submit_early = submit_early
        self._metrics = metrics

    async def ask(self, question: Question) -> AsyncGenerator[AnswerEvent]:
        """Progress, then deltas, then one final event. Closing the generator stops the work.

        A hand-off that failed and a vLLM that died are tried once more each, as long as no
        token has been sent.

        Raises:
            ServiceError: what ``Admission`` and ``fit_sampling`` raise; why the job, the
                hand-off or vLLM failed.
        """
        started = time.monotonic()
        plan = await self._admission.plan_prefix(question.spec)
        token_ids = await self._admission.prompt_token_ids(plan, question.messages)
        sampling = fit_sampling(
            question.sampling,
            question.max_tokens,
            len(token_ids),
            self._admission.limit,
            defaults=self._admission.generation_defaults,
        )
        answer = AnswerState(
            question=question,
            plan=plan,
            token_ids=token_ids,
            sampling=sampling,
            started=started,
        )
        # All jobs are released at the end: one must not be cancelled between two attempts.
        async with AsyncExitStack() as acquired:
            while True:
                job = await acquired.enter_async_context(
                    self._scheduler.acquire(question.spec, plan)
                )
                answer.waited = answer.waited or job.record.active
                try:
                    async with aclosing(self._attempt(answer, job)) as events:
                        async for event in events:
                            yield event
                    return
                except ServiceError as error:
                    await self._prepare_retry(answer, job, error)

    async def _prepare_retry(self, answer: AnswerState, job: Job, error: ServiceError) -> None:
        """Return if the answer may be tried again after this error, else raise it.

        Where the job has failed too, its error is the cause and is raised.
        """
        if error.reason in HANDOFF_REASONS:
            kind = "hand-off"
        elif error.reason is Reason.DECODER_UNAVAILABLE:
            kind = "vLLM"
        else:
            raise error
        if answer.first_token or kind in answer.retried:
            _raise_if_failed(job)
            raise error
        answer.retried.add(kind)
        logger.warning("answer on %s: %s; trying again", answer.plan.prefix_id, error)
        if kind == "vLLM":
            await self._wait_until_unready()
            return
        await asyncio.sleep(RETRY_PAUSE_S)
        if error.reason in BAD_PAGES and answer.manifest is not None:
            self._prefixes.invalidate_corrupt(answer.manifest)

    async def _wait_until_unready(self) -> None:
        """Let the generation server notice that vLLM is dead, if it is."""
        deadline = time.monotonic() + VLLM_NOTICE_S
        while self._generation.ready and time.monotonic() < deadline:  # noqa: ASYNC110 (it polls too)
            await asyncio.sleep(0.1)

    # ---- one attempt ---------------------------------------------------------------------

    async def _attempt(self, answer: AnswerState, job: Job) -> AsyncGenerator[AnswerEvent]:
        """Wait for the prefill, lease the prefix and let vLLM answer."""
        # A hand-off that failed while the ranks worked may have failed because the job is about
        # to: the second one waits for the job's end.
        late = "hand-off" in answer.retried or not self._submit_early or self._is_long(answer)
        waited_for = ACTIVE if late else {JobState.QUEUED}
        async with aclosing(self._wait_for(answer, job, waited_for)) as progress:
            async for event in progress:
                yield event
        _raise_if_failed(job)
        async with AsyncExitStack() as acquired:
            base = self._prefixes.open_lease(answer.plan.prefix_id)
            acquired.callback(self._prefixes.release_lease, base)
            answer.manifest = base.manifest
            text = None
            if self._is_long(answer):
                job_of_text = self._text.acquire_job(answer.plan, answer.token_ids, job)
                if (found := await acquired.enter_async_context(job_of_text)) is not None:
                    async with aclosing(self._wait_for(answer, found, ACTIVE)) as progress:
                        async for event in progress:
                            yield event
                    text = self._text.open_lease(acquired, found)
            async with aclosing(self._hand_over(answer, job, base, text=text)) as events:
                async for event in events:
                    yield event

    async def _wait_for(
        self, answer: AnswerState, job: Job, states: Container[JobState]
    ) -> AsyncGenerator[AnswerEvent]:
        """Progress of a job for as long as it is in one of some states; at least once."""
        while True:
            version = job.version
            yield self._progress(answer, job)
            if job.record.state not in states:
                return
            await job.wait_changed(version)

    def _is_long(self, answer: AnswerState) -> bool:
        """Whether the ranks are to compute the text after the prefix; not after a baseline's."""
        if answer.question.spec.comparison is not None:
            return False
        return self._text.is_wanted(answer.plan, answer.token_ids)

    async def _hand_over(
        self, answer: AnswerState, job: Job, base: Lease, *, text: Lease | None
    ) -> AsyncGenerator[AnswerEvent]:
        """Let vLLM have what the ranks have of the prompt, and do the rest."""
        lease = text or base
        handoff = HandoffParams(
            lease.manifest,
            lease.lease_id,
            self._reports.address,
            None if text is None else LeasedPages(base.manifest, base.lease_id),
        )
        try:
            with self._reports.follow_intake(lease.lease_id) as answer.intake:
                async with aclosing(self._answer_on(answer, job, handoff, lease=lease)) as events:
                    async for event in events:
                        yield event
        except ServiceError as error:
            if (cause := await self._reported_cause(error, lease)) is not None:
                raise cause from error
            raise
        finally:
            self._reports.forget(lease.lease_id)

    async def _reported_cause(self, error: ServiceError, lease: Lease) -> ServiceError | None:
        """Why vLLM failed, if that is what ``error`` says and the connector has reported it."""
        if error.reason is not Reason.DECODER_FAILED:
            return None
        report = await self._reports.wait(lease.lease_id, REPORT_WAIT_S)
        if report is None or report.ok or not report.error:
            return None
        return ServiceError.from_dict(report.error)

    async def _answer_on(
        self, answer: AnswerState, job: Job, handoff: HandoffParams, *, lease: Lease
    ) -> AsyncGenerator[AnswerEvent]:
        """Progress of the job until the first token is there, then the answer."""
        async with aclosing(self._generate(answer, job, handoff)) as tokens:
            first = asyncio.ensure_future(anext(tokens, None))
            async with aclosing(self._progress_until(first, answer, job, lease=lease)) as progress:
                async for event in progress:
                    yield event
            token = first.result()
            if token is not None:
                answer.first_token = time.monotonic()
                self._traces.note_span(
                    job.record.job_id,
                    QUESTIONS,
                    "hand-off and first token",
                    start=answer.submitted,
                )
            while token is not None:
                if token.text or token.token_ids:
                    yield AnswerDelta(token.text, tuple(token.token_ids))
                if token.finish_reason:
                    yield await self._finish(answer, job, token, lease)
                    return
                token = await anext(tokens, None)
        raise ServiceError(Reason.DECODER_FAILED, "vLLM ended the answer without a reason")

    async def _finish(
        self, answer: AnswerState, job: Job, last: GenerationEvent, lease: Lease
    ) -> AnswerFinal:
        """The final event, counted and traced."""
        report = await self._reports.wait(lease.lease_id, REPORT_WAIT_S / 4)
        final = answer.make_final(job, last, report)
        self._traces.note_span(
            final.job_id,
            QUESTIONS,
            "answer",
            start=answer.submitted,
            handoff_ms=round(final.handoff_s * 1000, 3),
            kv_bytes_moved=final.kv_bytes_moved,
            prompt_tokens=final.prompt_tokens,
            completion_tokens=final.completion_tokens,
        )
        self._metrics.record_answer(
            final.finish_reason,
            tokens=final.completion_tokens,
            first_token_s=final.first_token_s,
            handoff_bytes=final.kv_bytes_moved,
        )
        return final

    async def _generate(
        self, answer: AnswerState, job: Job, handoff: HandoffParams
    ) -> AsyncGenerator[GenerationEvent]:
        """vLLM's tokens, once it is ready."""
        deadline = time.monotonic() + self._vllm_wait_s
        while not self._generation.ready:
            if time.monotonic() > deadline:
                answer.retried.add("vLLM")
                raise ServiceError(
                    Reason.DECODER_UNAVAILABLE,
                    f"vLLM has not become ready within {self._vllm_wait_s:g} s",
                    timeout_s=self._vllm_wait_s,
                )
            await asyncio.sleep(0.1)
        answer.submitted = time.monotonic()
        request = GenerationRequest(
            token_ids=answer.token_ids,
            plan=answer.plan,
            handoff=handoff,
            sampling=answer.sampling,
            request_id=handoff.lease_id,
            prefilled=not job.record.active,
            last_sign=lambda: answer.intake.reported_at,
        )
        async with aclosing(self._generation.generate(request)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    def _progress(self, answer: AnswerState, job: Job) -> AnswerProgress:
        record = self._jobs.snapshot(job)
        if (report := answer.intake.latest) is None:
            return AnswerProgress(record)
        return AnswerProgress(record, report.computed_tokens, report.prompt_tokens)

    async def _progress_until(
        self,
        first: asyncio.Future[GenerationEvent | None],
        answer: AnswerState,
        job: Job,
        *,
        lease: Lease,
    ) -> AsyncGenerator[AnswerEvent]:
        """Progress of the job and of vLLM until the first token, or vLLM's failure, is there.

        Raises:
            ServiceError: the job's error; STALE_GENERATION when the pages are lost.
        """
        attempt = job.record.attempts
        lost = asyncio.ensure_future(lease.lost.wait())
        changed = asyncio.ensure_future(job.wait_changed(job.version))
        reported = asyncio.ensure_future(answer.intake.wait_report())
        was_active = job.record.active
        try:
            while not first.done():
                waits: set[asyncio.Future[Any]] = {first, lost, changed, reported}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if changed.done() or reported.done():
                    if changed.done():
                        changed = asyncio.ensure_future(job.wait_changed(job.version))
                    if reported.done():
                        reported = asyncio.ensure_future(answer.intake.wait_report())
                    was_active = job.record.active
                    yield self._progress(answer, job)
                if lost.done() and not first.done():
                    raise await _loss(job, attempt)
            if was_active and first.exception() is None:
                # The last page is complete a moment before the job is.
                await job.wait_ended(REPORT_WAIT_S)
                yield self._progress(answer, job)
        finally:
            waits = {first, lost, changed, reported}
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)


async def _loss(job: Job, attempt: int) -> ServiceError:
    """Why the pages of a lease are gone. The job learns it a moment later than the lease."""
    while job.record.state is JobState.RUNNING and job.record.attempts == attempt:
        await job.wait_changed(job.version, min_interval_s=0)
    if job.record.state in (JobState.FAILED, JobState.CANCELLED):
        return ServiceError.from_dict(dict(job.record.error or {}))
    return ServiceError(
        Reason.STALE_GENERATION,
        "the ranks lost the prefix before it reached vLLM",
        prefix_id=job.record.prefix_id,
    )


def _raise_if_failed(job: Job) -> None:
    if job.record.error is not None:
        raise ServiceError.from_dict(dict(job.record.error))
