"""Messages of ``prefill.v1`` about attention: the policy, its report, and the baselines."""

from __future__ import annotations

from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.api.optional_fields import optional_field
from prefill_service.api.time_messages import duration_to_proto
from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import BlockMap
from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.baselines.methods import BaselineName
from prefill_service.scheduling.attention_summary import AttentionMeasures, AttentionSummary
from prefill_service.scheduling.baseline_spec import BaselineSpec

_QUALITIES: dict[int, Quality | None] = {
    pb.QUALITY_UNSPECIFIED: None,
    **{pb.Quality.Value(f"QUALITY_{q.name}"): q for q in Quality},
}
_METHODS = {pb.ComparisonMethod.Value(f"COMPARISON_METHOD_{m.name}"): m for m in BaselineName}


# ---- the policy and its report ----------------------------------------------------------------


def policy_from_proto(message: pb.AttentionSpec) -> AttentionPolicy:
    """The policy that a request asks for.

    Raises:
        ServiceError: INVALID_REQUEST, naming the value and what is accepted.
    """
    quality = _QUALITIES[message.quality]
    epsilon = optional_field(message, "epsilon")
    if quality is Quality.EXACT and epsilon == 0:
        epsilon = None  # that is what EXACT means
    min_kept_mass = optional_field(message, "min_kept_mass")
    try:
        return resolve_policy(quality, epsilon, min_kept_mass)
    except ValueError as error:
        raise ServiceError(
            Reason.INVALID_REQUEST, f"spec.attention: {error}", name="spec.attention"
        ) from error


def policy_to_proto(policy: AttentionPolicy) -> pb.AttentionSpec:
    """The policy in a form that a request may repeat: an epsilon only if no step has it."""
    return pb.AttentionSpec(
        quality=f"QUALITY_{policy.quality.name}",
        epsilon=policy.epsilon if policy.quality is Quality.CUSTOM else None,
        min_kept_mass=policy.min_kept_mass,
    )


def attention_to_proto(summary: AttentionSummary, brief: bool = False) -> pb.AttentionReport:
    """The report of a job; ``brief`` leaves out the layers."""
    return pb.AttentionReport(
        quality=f"QUALITY_{summary.policy.quality.name}",
        epsilon=summary.policy.epsilon,
        min_kept_mass=summary.policy.min_kept_mass,
        floor_met=summary.floor_met,
        imbalance=summary.imbalance,
        imbalance_before=summary.imbalance_before,
        sparse_from_tokens=summary.sparse_from_tokens,
        total=_measures_to_proto(summary.total),
        layers=[
            pb.LayerAttention(
                layer=layer.layer,
                measures=_measures_to_proto(layer.measures),
                head_density=layer.head_density,
            )
            for layer in (() if brief else summary.layers)
        ],
    )


def _measures_to_proto(measures: AttentionMeasures) -> pb.AttentionMeasures:
    return pb.AttentionMeasures(
        density=measures.density,
        sampled_rows=measures.sampled_rows,
        kept_mass_mean=measures.kept_mass_mean,
        kept_mass_p5=measures.kept_mass_p5,
        kept_mass_min=measures.kept_mass_min,
        output_error_mean=measures.output_error_mean,
        output_error_p95=measures.output_error_p95,
        tiles=measures.tiles,
        tiles_redone=measures.tiles_redone,
        tiles_dense=measures.tiles_dense,
        select=duration_to_proto(measures.select_s),
        attend=duration_to_proto(measures.attend_s),
        certify=duration_to_proto(measures.certify_s),
    )


def block_map_to_proto(block_map: BlockMap) -> pb.BlockMap:
    """The density of blocks, [rows, columns] as one list."""
    return pb.BlockMap(
        layer=block_map.layer,
        kv_head=block_map.kv_head,
        rows=block_map.rows,
        columns=block_map.columns,
        density=block_map.density,
    )


# ---- baselines, which the messages call comparisons -----------------------------------------


def comparison_from_proto(message: pb.PrefillSpec, question: str = "") -> BaselineSpec | None:
    """The baseline that a request asks for, if any.

    Args:
        message: the request's spec.
        question: the question asked with it, for a spec that names none.

    Raises:
        ServiceError: INVALID_REQUEST: attention was chosen too; QUESTION_EMPTY.
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
    text = asked.question or question
    if not text.strip():
        raise ServiceError(
            Reason.QUESTION_EMPTY, "spec.comparison.question is empty: the method consults it"
        )
    return BaselineSpec(
        method=_METHODS[asked.method],
        question=text,
        anchor_tokens=optional_field(asked, "anchor_tokens"),
        passing_tokens=optional_field(asked, "passing_tokens"),
    )


def comparison_to_proto(spec: BaselineSpec) -> pb.ComparisonSpec:
    """The baseline in a form that a request may repeat."""
    return pb.ComparisonSpec(
        method=f"COMPARISON_METHOD_{spec.method.name}",
        question=spec.question,
        anchor_tokens=spec.anchor_tokens,
        passing_tokens=spec.passing_tokens,
    )
