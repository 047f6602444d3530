"""What is known of one answer while it is made, over its attempts, and its end made of that."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from prefill_service.generation.vllm_client import GenerationEvent, Sampling
from prefill_service.kv.handoff import HandoffReport
from prefill_service.kv.handoff_reports import Intake
from prefill_service.kv.manifest import Manifest
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.scheduling.answering.answer_events import AnswerFinal, Question
from prefill_service.scheduling.job import Job
from prefill_service.video.index import VideoWarning


@dataclass(slots=True)
class AnswerState:
    """State of one answer over its attempts; times are ``time.monotonic()``.

    Attributes:
        manifest: of the prefix that was handed off last.
        intake: how far vLLM is with the prompt, in the last attempt.
        retried: kinds of failure after which it was tried again.
        waited: whether the job was active when the answer came to it.
    """

    question: Question
    plan: PrefixPlan
    token_ids: list[int]
    sampling: Sampling
    started: float
    submitted: float = 0.0
    first_token: float = 0.0
    manifest: Manifest | None = None
    intake: Intake = field(default_factory=Intake)
    retried: set[str] = field(default_factory=set)
    waited: bool = False

    def make_final(
        self, job: Job, last: GenerationEvent, report: HandoffReport | None
    ) -> AnswerFinal:
        """The final event: timings, counts, and what the user should know of the frames.

        Args:
            job: that made the prefix.
            last: vLLM's last event.
            report: of the hand-off, if it has come.
        """
        now = time.monotonic()
        return AnswerFinal(
            finish_reason=last.finish_reason,
            job_id=job.record.job_id,
            prefix_id=self.plan.prefix_id,
            prefill_wait_s=max(0.0, job.ended_at - self.started) if self.waited else 0.0,
            decoder_first_token_s=self.first_token - self.submitted,
            first_token_s=self.first_token - self.started,
            total_s=now - self.started,
            handoff_s=report.seconds if report else 0.0,
            prompt_tokens=last.prompt_tokens or len(self.token_ids),
            video_tokens=self.plan.num_video_tokens,
            completion_tokens=last.completion_tokens,
            kv_tokens_moved=report.tokens if report else 0,
            kv_bytes_moved=report.bytes if report else 0,
            cached_tokens=last.cached_tokens,
            warnings=tuple(dict.fromkeys((*self.plan.warnings, *_result_warnings(job)))),
            frame_indices=self.plan.frame_indices,
            frame_seconds=self.plan.frame_seconds,
        )


def _result_warnings(job: Job) -> tuple[VideoWarning, ...]:
    """What the job that computed the frames has to say of them."""
    return job.record.result.warnings if job.record.result is not None else ()
