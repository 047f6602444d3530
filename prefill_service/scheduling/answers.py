"""The flow of one answer: plan, prefix, lease, hand-off, tokens; and what is tried again.

On GPUs the question goes to vLLM as soon as the ranks have begun: pages are pulled while later
chunks are computed, and only the last one is left to move at the end. On a CPU it waits for the
job's end: vLLM's engine spins while a load is outstanding (measured: 0.9 of a core), which the
ranks need more than the few milliseconds that moving everything at the end takes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import GenerationEvent, GenerationRequest, Sampling
from prefill_service.kv.handoff import HandoffParams, HandoffReport
from prefill_service.kv.handoff_reports import ReportServer
from prefill_service.kv.manifest import Manifest
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.scheduling.admission import Admission
from prefill_service.scheduling.job import ACTIVE, Job, JobRecord, JobState, PrefillSpec
from prefill_service.scheduling.metrics import Metrics
from prefill_service.scheduling.prefix_cache import Lease
from prefill_service.scheduling.sampling import fit_sampling
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
"""Long enough for the group to notice the death of a rank that broke a hand-off."""

DECODER_NOTICE_S = 8.0
"""Longer than the decoder's watcher takes to notice a dead vLLM."""

REPORT_WAIT_S = 1.0
"""How long the report that explains a failed answer is waited for."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked (``prefill.v1.AskRequest``).

    Attributes:
        messages: (role, text) pairs, roles "user" and "assistant".
        sampling: how to decode, but for ``max_tokens``.
        max_tokens: ``None`` for 256, or what room there is.
    """

    spec: PrefillSpec
    messages: tuple[tuple[str, str], ...]
    sampling: Sampling
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class AnswerProgress:
    """How far the prefill is."""

    job: JobRecord


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """The next piece of the answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AnswerFinal:
    """The end of the answer; times in seconds (``prefill.v1.AskTimings``, ``AskUsage``)."""

    finish_reason: str
    job_id: str
    prefix_id: str
    prefill_wait_s: float
    decoder_first_token_s: float
    first_token_s: float
    total_s: float
    handoff_s: float
    prompt_tokens: int
    video_tokens: int
    completion_tokens: int
    kv_tokens_moved: int
    kv_bytes_moved: int
    cached_tokens: int


AnswerEvent = AnswerProgress | AnswerDelta | AnswerFinal


@dataclass(slots=True)
class _Run:
    """State of one answer over its attempts; times are ``time.monotonic()``."""

    question: Question
    plan: PrefixPlan
    token_ids: list[int]
    sampling: Sampling
    started: float
    submitted: float = 0.0
    first_token: float = 0.0
    manifest: Manifest | None = None
    retried: set[str] = field(default_factory=set)
    waited: bool = False


class Answers:
    """Answers questions.

    Args:
        decoder_wait_s: how long an answer waits for a vLLM that is starting.
        submit_early: submit while the ranks compute, see above.
        metrics: told of each completed answer.
    """

    def __init__(
        self,
        planning: Admission,
        scheduler: Scheduler,
        decoder: GenerationServer,
        reports: ReportServer,
        decoder_wait_s: float,
        submit_early: bool,
        metrics: Metrics,
    ) -> None:
        self._planning = planning
        self._scheduler = scheduler
        self._prefixes = scheduler.prefixes
        self._decoder = decoder
        self._reports = reports
        self._decoder_wait_s = decoder_wait_s
        self._submit_early = submit_early
        self._metrics = metrics

    async def ask(self, question: Question) -> AsyncGenerator[AnswerEvent]:
        """Progress, then deltas, then one final event. Closing the generator stops the work.

        A hand-off that failed and a vLLM that died are tried once more each, as long as no
        token has been sent.

        Raises:
            ServiceError: what ``Admission`` and ``fit_sampling`` raise; why the job, the
                hand-off or the decoder failed.
        """
        started = time.monotonic()
        plan = await self._planning.plan(question.spec)
        token_ids = await self._planning.prompt(plan, question.messages)
        sampling = fit_sampling(
            question.sampling, question.max_tokens, len(token_ids), self._planning.limit
        )
        run = _Run(question, plan, token_ids, sampling, started)
        # Left together at the end: a job must not be cancelled between two attempts.
        async with AsyncExitStack() as interests:
            while True:
                interest = self._scheduler.interest(question.spec, plan)
                job = await interests.enter_async_context(interest)
                run.waited = run.waited or job.record.active
                try:
                    async with aclosing(self._attempt(run, job)) as events:
                        async for event in events:
                            yield event
                    return
                except ServiceError as error:
                    await self._prepare_retry(run, job, error)

    async def _prepare_retry(self, run: _Run, job: Job, error: ServiceError) -> None:
        """Return if the answer may be tried again after this error, else raise it.

        Where the job has failed too, that is why, and its error is raised.
        """
        if error.reason in HANDOFF_REASONS:
            kind = "hand-off"
        elif error.reason is Reason.DECODER_UNAVAILABLE:
            kind = "decoder"
        else:
            raise error
        if run.first_token or kind in run.retried:
            _raise_if_failed(job)
            raise error
        run.retried.add(kind)
        logger.warning("answer on %s: %s; trying again", run.plan.prefix_id, error)
        if kind == "decoder":
            await self._decoder_noticed()
            return
        await asyncio.sleep(RETRY_PAUSE_S)
        if error.reason in BAD_PAGES and run.manifest is not None:
            self._prefixes.condemn(run.manifest)

    async def _decoder_noticed(self) -> None:
        """Let the decoder's watcher notice that vLLM is dead, if it is."""
        deadline = time.monotonic() + DECODER_NOTICE_S
        while self._decoder.ready and time.monotonic() < deadline:  # noqa: ASYNC110 (it polls too)
            await asyncio.sleep(0.1)

    async def _attempt(self, run: _Run, job: Job) -> AsyncGenerator[AnswerEvent]:
        # A hand-off that failed while the ranks worked may have failed because the job is about
        # to: the second one waits for the job's end.
        late = "hand-off" in run.retried or not self._submit_early
        waited_for = ACTIVE if late else {JobState.QUEUED}
        while True:
            version = job.version
            yield AnswerProgress(self._scheduler.jobs.snapshot(job))
            if job.record.state not in waited_for:
                break
            await job.changed(version)
        _raise_if_failed(job)
        lease = self._prefixes.lease(run.plan.prefix_id)
        run.manifest = lease.manifest
        try:
            async with aclosing(self._decode(run, job, lease)) as events:
                async for event in events:
                    yield event
        finally:
            self._prefixes.release(lease)

    async def _decode(self, run: _Run, job: Job, lease: Lease) -> AsyncGenerator[AnswerEvent]:
        try:
            async with aclosing(self._tokens(run, job, lease)) as tokens:
                head = asyncio.ensure_future(anext(tokens, None))
                async with aclosing(self._progress_until(head, job, lease)) as progress:
                    async for event in progress:
                        yield event
                token = head.result()
                while token is not None:
                    if not run.first_token:
                        self._first_token(run, job)
                    if token.text or token.token_ids:
                        yield AnswerDelta(token.text, tuple(token.token_ids))
                    if token.finish_reason:
                        report = await self._reports.wait(lease.lease_id, REPORT_WAIT_S / 4)
                        final = _final(run, job, token, report)
                        self._trace_end(run, final)
                        self._metrics.answered(
                            final.finish_reason, final.completion_tokens, final.first_token_s,
                            final.kv_bytes_moved,
                        )  # fmt: skip
                        yield final
                        return
                    token = await anext(tokens, None)
            raise ServiceError(Reason.DECODER_FAILED, "vLLM ended the answer without a reason")
        except ServiceError as error:
            if error.reason is Reason.DECODER_FAILED:
                report = await self._reports.wait(lease.lease_id, REPORT_WAIT_S)
                if report is not None and not report.ok and report.error:
                    raise ServiceError.from_dict(report.error) from error
            raise

    def _first_token(self, run: _Run, job: Job) -> None:
        run.first_token = time.monotonic()
        self._scheduler.jobs.traces.note(
            job.record.job_id, QUESTIONS, "hand-off and first token", run.submitted
        )

    def _trace_end(self, run: _Run, final: AnswerFinal) -> None:
        self._scheduler.jobs.traces.note(
            final.job_id, QUESTIONS, "answer", run.submitted,
            handoff_ms=round(final.handoff_s * 1000, 3), kv_bytes_moved=final.kv_bytes_moved,
            prompt_tokens=final.prompt_tokens, completion_tokens=final.completion_tokens,
        )  # fmt: skip

    async def _tokens(self, run: _Run, job: Job, lease: Lease) -> AsyncGenerator[GenerationEvent]:
        deadline = time.monotonic() + self._decoder_wait_s
        while not self._decoder.ready:
            if time.monotonic() > deadline:
                run.retried.add("decoder")
                raise ServiceError(
                    Reason.DECODER_UNAVAILABLE,
                    f"vLLM has not become ready within {self._decoder_wait_s:g} s",
                    timeout_s=self._decoder_wait_s,
                )
            await asyncio.sleep(0.1)
        run.submitted = time.monotonic()
        request = GenerationRequest(
            token_ids=run.token_ids,
            plan=run.plan,
            handoff=HandoffParams(lease.manifest, lease.lease_id, self._reports.address),
            sampling=run.sampling,
            request_id=lease.lease_id,
            prefilled=not job.record.active,
        )
        async with aclosing(self._decoder.generate(request)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def _progress_until(
        self, head: asyncio.Future[GenerationEvent | None], job: Job, lease: Lease
    ) -> AsyncGenerator[AnswerEvent]:
        """Progress of the job until the first token, or the decoder's failure, is there.

        Raises:
            ServiceError: the job's error; STALE_GENERATION when the pages are lost.
        """
        attempt = job.record.attempts
        lost = asyncio.ensure_future(lease.lost.wait())
        changed = asyncio.ensure_future(job.changed(job.version))
        was_active = job.record.active
        try:
            while not head.done():
                waits: set[asyncio.Future[Any]] = {head, lost, changed}
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                if changed.done():
                    changed = asyncio.ensure_future(job.changed(job.version))
                    was_active = job.record.active
                    yield AnswerProgress(self._scheduler.jobs.snapshot(job))
                if lost.done() and not head.done():
                    raise await _loss(job, attempt)
            if was_active and head.exception() is None:
                # The last page is complete a moment before the job is.
                await job.ended(REPORT_WAIT_S)
                yield AnswerProgress(self._scheduler.jobs.snapshot(job))
        finally:
            waits = {head, lost, changed}
            for task in waits:
                task.cancel()
            await asyncio.wait(waits)


async def _loss(job: Job, attempt: int) -> ServiceError:
    """Why the pages of a lease are gone. The job learns it a moment later than the lease."""
    while job.record.state is JobState.RUNNING and job.record.attempts == attempt:
        await job.changed(job.version, min_interval_s=0)
    if job.record.state in (JobState.FAILED, JobState.CANCELLED):
        return ServiceError.from_dict(dict(job.record.error or {}))
    return ServiceError(
        Reason.STALE_GENERATION, "the ranks lost the prefix before it reached vLLM",
        prefix_id=job.record.prefix_id,
    )  # fmt: skip


def _raise_if_failed(job: Job) -> None:
    if job.record.error is not None:
        raise ServiceError.from_dict(dict(job.record.error))


def _final(run: _Run, job: Job, last: GenerationEvent, report: HandoffReport | None) -> AnswerFinal:
    now = time.monotonic()
    return AnswerFinal(
        finish_reason=last.finish_reason,
        job_id=job.record.job_id,
        prefix_id=run.plan.prefix_id,
        prefill_wait_s=max(0.0, job.ended_at - run.started) if run.waited else 0.0,
        decoder_first_token_s=run.first_token - run.submitted,
        first_token_s=run.first_token - run.started,
        total_s=now - run.started,
        handoff_s=report.seconds if report else 0.0,
        prompt_tokens=last.prompt_tokens or len(run.token_ids),
        video_tokens=run.plan.num_video_tokens,
        completion_tokens=last.completion_tokens,
        kv_tokens_moved=report.tokens if report else 0,
        kv_bytes_moved=report.bytes if report else 0,
        cached_tokens=last.cached_tokens,
    )
