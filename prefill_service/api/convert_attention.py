"""Attention: between the messages of ``prefill.v1`` and our dataclasses."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.attention.quality import AttentionPolicy, Quality, resolve_policy
from prefill_service.attention.report import BlockMap
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.attention_summary import AttentionMeasures, AttentionSummary

_QUALITIES: dict[int, Quality | None] = {
    pb.QUALITY_UNSPECIFIED: None,
    **{pb.Quality.Value(f"QUALITY_{q.name}"): q for q in Quality},
}


def policy_from_proto(message: pb.AttentionSpec) -> AttentionPolicy:
    """The policy a request asks for.

    Raises:
        ServiceError: INVALID_REQUEST, naming the value and what is accepted.
    """
    if message.quality not in _QUALITIES:
        names = ", ".join(pb.Quality.keys())
        raise ServiceError(
            Reason.INVALID_REQUEST,
            f"spec.attention.quality is {message.quality}; it must be one of {names}",
            name="spec.attention.quality",
            value=message.quality,
        )
    quality = _QUALITIES[message.quality]
    epsilon = message.epsilon if message.HasField("epsilon") else None
    if quality is Quality.EXACT and epsilon == 0:
        epsilon = None  # the same said twice
    floor = message.min_kept_mass if message.HasField("min_kept_mass") else None
    try:
        return resolve_policy(quality, epsilon, floor)
    except ValueError as error:
        raise ServiceError(
            Reason.INVALID_REQUEST, f"spec.attention: {error}", name="spec.attention"
        ) from error


def policy_to_proto(policy: AttentionPolicy) -> pb.AttentionSpec:
    """In a form that a request may repeat: an epsilon only where no step of the dial has it."""
    return pb.AttentionSpec(
        quality=f"QUALITY_{policy.quality.name}",
        epsilon=policy.epsilon if policy.quality is Quality.CUSTOM else None,
        min_kept_mass=policy.min_kept_mass,
    )


def attention_to_proto(summary: AttentionSummary, brief: bool = False) -> pb.AttentionReport:
    """A report; ``brief`` leaves out the layers."""
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
        select=duration(measures.select_s),
        attend=duration(measures.attend_s),
        certify=duration(measures.certify_s),
    )


def block_map_to_proto(block_map: BlockMap) -> pb.BlockMap:
    """A block map."""
    return pb.BlockMap(
        layer=block_map.layer,
        kv_head=block_map.kv_head,
        rows=block_map.rows,
        columns=block_map.columns,
        density=block_map.density,
    )


def duration(seconds: float) -> Duration:
    """A duration."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
