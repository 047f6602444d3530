"""Comparison modes: between the messages of ``prefill.v1`` and our dataclasses."""

from __future__ import annotations

from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.baselines.method import Comparison
from prefill_service.scheduling.baseline_spec import BaselineSpec

_METHODS = {pb.ComparisonMethod.Value(f"COMPARISON_METHOD_{m.name}"): m for m in Comparison}


def comparison_from_proto(message: pb.PrefillSpec, question: str = "") -> BaselineSpec | None:
    """The method a request asks for, if any.

    Args:
        message: the request's spec.
        question: that it asks, for a spec that names none.

    Raises:
        ServiceError: INVALID_REQUEST: no known method, or attention was chosen too; QUESTION_EMPTY.
    """
    if not message.HasField("comparison"):
        return None
    asked = message.comparison
    if message.HasField("attention"):
        raise ServiceError(
            Reason.INVALID_REQUEST,
            "spec.attention and spec.comparison exclude each other: a published method has no dial",
            name="spec.comparison",
        )
    if asked.method not in _METHODS:
        names = ", ".join(pb.ComparisonMethod.keys()[1:])
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"spec.comparison.method is {asked.method}; it must be one of {names}",
            name="spec.comparison.method",
            value=asked.method,
        )
    text = asked.question or question
    if not text.strip():
        raise ServiceError(
            Reason.QUESTION_EMPTY, "spec.comparison.question is empty: the method consults it"
        )
    return BaselineSpec(
        _METHODS[asked.method],
        text,
        asked.anchor_tokens if asked.HasField("anchor_tokens") else None,
        asked.passing_tokens if asked.HasField("passing_tokens") else None,
    )


def comparison_to_proto(spec: BaselineSpec) -> pb.ComparisonSpec:
    """In a form that a request may repeat."""
    return pb.ComparisonSpec(
        method=f"COMPARISON_METHOD_{spec.method.name}",
        question=spec.question,
        anchor_tokens=spec.anchor_tokens,
        passing_tokens=spec.passing_tokens,
    )
