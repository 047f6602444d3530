"""Long questions' text, which the ranks compute after the prefix instead of vLLM.

Text after the video is causal like the rest of the prompt. So the job of a text extends the job of
a prefix, on the ranks that hold it, by all of the text but its last token.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import numpy as np

from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import PrefixPlan, extend_plan
from prefill_service.scheduling.job import Job, JobState
from prefill_service.scheduling.prefix_cache import Lease
from prefill_service.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class TextOnRanks:
    """Decides which questions' text the ranks compute, and holds the jobs that do.

    Args:
        scheduler: of the jobs; its ``text_from_tokens`` is the longest text left to vLLM.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._prefixes = scheduler.prefixes
        self._from_tokens = scheduler.text_from_tokens

    def is_wanted(self, plan: PrefixPlan, token_ids: Sequence[int]) -> bool:
        """Whether the ranks are to compute what a prompt has after the prefix of ``plan``."""
        return 0 < self._from_tokens < len(token_ids) - plan.num_tokens

    @asynccontextmanager
    async def acquire_job(
        self, plan: PrefixPlan, token_ids: Sequence[int], base: Job
    ) -> AsyncIterator[Job | None]:
        """The job that has or makes a prompt's text; ``None`` if the queue is full.

        What earlier turns of a chat have left is taken as it is if vLLM has few tokens to add.

        Args:
            plan: of the prefix.
            token_ids: of the whole prompt.
            base: the job that has the prefix.
        """
        prompt = np.asarray(token_ids, np.int32)
        known = self._scheduler.find_text(base, prompt)
        if known is not None and len(prompt) - known.record.prefix_tokens <= self._from_tokens:
            yield known
            return
        extended = extend_plan(plan, token_ids[plan.num_tokens : -1])
        async with AsyncExitStack() as acquired:
            job = None
            try:
                text = self._scheduler.acquire_text(extended, base)
                job = await acquired.enter_async_context(text)
            except ServiceError as error:
                if error.reason is not Reason.QUEUE_FULL:
                    raise
            yield job

    def open_lease(self, acquired: AsyncExitStack, job: Job) -> Lease | None:
        """A lease on a text that the ranks have computed, which ``acquired`` releases.

        One that they could not compute is left to vLLM, which needs longer.
        """
        if job.record.state is not JobState.SUCCEEDED:
            logger.warning("vLLM computes a long question, since the ranks: %s", job.record.error)
            return None
        lease = self._prefixes.open_lease(job.record.prefix_id)
        acquired.callback(self._prefixes.release_lease, lease)
        return lease
