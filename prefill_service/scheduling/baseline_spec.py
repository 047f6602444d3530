"""A request for a published method instead of ours, and the task that the ranks get for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefill_service.engine.messages import BaselineTask
from prefill_service.engine.shard_map import baseline_split
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.prefix_plan import PrefixPlan
from prefill_service.parallel.baselines.methods import BaselineName, baseline_method


@dataclass(frozen=True, slots=True)
class BaselineSpec:
    """Which method (``prefill.v1.ComparisonSpec``).

    Attributes:
        question: the question that the method consults.
        anchor_tokens, passing_tokens: lengths; as published if ``None``.
    """

    method: BaselineName
    question: str
    anchor_tokens: int | None = None
    passing_tokens: int | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BaselineSpec:
        """Rebuild a spec from ``dataclasses.asdict``."""
        return cls(**{**data, "method": BaselineName(data["method"])})

    def attention_key(self, ranks: int) -> str:
        """Name for the manifest; part of the prefix id, because all of it changes the KV."""
        anchor, passing = (
            "published" if tokens is None else tokens
            for tokens in (self.anchor_tokens, self.passing_tokens)
        )
        question = hashlib.sha256(self.question.encode()).hexdigest()
        return (
            f"{self.method}:anchor_tokens={anchor},passing_tokens={passing},ranks={ranks},"
            f"question={question}"
        )

    def make_task(self, plan: PrefixPlan, question_ids: Sequence[int], ranks: int) -> BaselineTask:
        """How the ranks compute the prefix of ``plan``.

        Args:
            question_ids: tokens after the prefix.
            ranks: number of all ranks.

        Raises:
            ServiceError: INVALID_REQUEST, for lengths that the method or the video cannot have.
        """
        try:
            method = baseline_method(
                self.method,
                plan.num_tokens,
                ranks,
                anchor_tokens=self.anchor_tokens,
                passing_tokens=self.passing_tokens,
            )
            task = BaselineTask(method, tuple(question_ids))
            baseline_split(plan, task, ranks)
        except ValueError as error:
            raise ServiceError(
                Reason.INVALID_REQUEST, f"spec.comparison: {error}", name="spec.comparison"
            ) from error
        return task
