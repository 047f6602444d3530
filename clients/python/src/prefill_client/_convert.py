"""From protobuf messages to the dataclasses of ``types``."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill.v1 import video_service_pb2 as video_pb
from prefill_client import attention, types


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(message: Any, name: str) -> datetime | None:
    if not message.HasField(name):
        return None
    timestamp: Timestamp = getattr(message, name)
    return timestamp.ToDatetime(tzinfo=UTC)


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _enum(wrapper: Any, value: int, prefix: str, target: Any) -> Any:
    """Convert an enum value; one that this release does not know is UNSPECIFIED."""
    name = wrapper.Name(value).removeprefix(prefix) if value in wrapper.values() else ""
    return target[name] if name in target.__members__ else target.UNSPECIFIED


def video(message: video_pb.Video) -> types.Video:
    """Convert a Video."""
    return types.Video(
        video_id=message.video_id,
        display_name=message.display_name,
        state=_enum(video_pb.VideoState, message.state, "VIDEO_STATE_", types.VideoState),
        size_bytes=message.size_bytes,
        committed_bytes=message.committed_bytes,
        sha256=message.sha256,
        create_time=_time(message, "create_time"),
        expire_time=_time(message, "expire_time"),
        info=_video_info(message.info) if message.HasField("info") else None,
        error_reason=message.error_reason,
        error_message=message.error_message,
        warnings=warnings(message.warnings),
    )


def warnings(messages: Iterable[video_pb.VideoWarning]) -> tuple[types.VideoWarning, ...]:
    """Convert the warnings of a Video, a result or an answer."""
    return tuple(types.VideoWarning(entry.reason, entry.message) for entry in messages)


def _video_info(message: video_pb.VideoInfo) -> types.VideoInfo:
    ratio = message.sample_aspect_ratio
    return types.VideoInfo(
        container=message.container,
        codec=message.codec,
        width=message.width,
        height=message.height,
        frame_count=message.frame_count,
        fps=message.fps,
        duration_s=_seconds(message.duration),
        keyframe_count=message.keyframe_count,
        stored=_frame_size(message.stored) if message.HasField("stored") else None,
        sample_aspect_ratio=(ratio.numerator or 1, ratio.denominator or 1),
        sizes=tuple(_frame_size(size) for size in message.sizes),
        rotation=message.rotation,
        mirrored=message.mirrored,
    )


def _frame_size(message: video_pb.FrameSize) -> types.FrameSize:
    return types.FrameSize(message.width, message.height, message.frames)


def job(message: prefill_pb.PrefillJob) -> types.Job:
    """Convert a PrefillJob."""
    error = message.error
    return types.Job(
        job_id=message.job_id,
        spec=_spec(message.spec),
        state=_enum(prefill_pb.JobState, message.state, "JOB_STATE_", types.JobState),
        progress=tuple(_progress(entry) for entry in message.progress),
        attempts=message.attempts,
        queue_position=message.queue_position,
        error=types.JobError(error.reason, error.message, dict(error.metadata))
        if message.HasField("error")
        else None,
        result=_result(message.result) if message.HasField("result") else None,
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        prefix_tokens=message.prefix_tokens,
    )


def _spec(message: prefill_pb.PrefillSpec) -> types.PrefillSpec:
    sampling = message.sampling
    return types.PrefillSpec(
        video_id=message.video_id,
        fps=_optional(sampling, "fps"),
        num_frames=_optional(sampling, "num_frames"),
        max_pixels=_optional(sampling, "max_pixels"),
        min_pixels=_optional(sampling, "min_pixels"),
        cap_pixels_per_frame=_optional(sampling, "cap_pixels_per_frame"),
        square_pixels=_optional(sampling, "square_pixels"),
        max_frames=_optional(sampling, "max_frames"),
        sample_by=_enum(prefill_pb.SampleBy, sampling.by, "SAMPLE_BY_", types.SampleBy),
        system_prompt=message.system_prompt,
        quality=_quality(message.attention.quality),
        epsilon=_optional(message.attention, "epsilon"),
        min_kept_mass=_optional(message.attention, "min_kept_mass"),
        comparison=_comparison(message.comparison) if message.HasField("comparison") else None,
    )


def _comparison(message: prefill_pb.ComparisonSpec) -> types.Comparison:
    return types.Comparison(
        method=_enum(
            prefill_pb.ComparisonMethod,
            message.method,
            "COMPARISON_METHOD_",
            types.ComparisonMethod,
        ),
        question=message.question,
        anchor_tokens=_optional(message, "anchor_tokens"),
        passing_tokens=_optional(message, "passing_tokens"),
    )


def _quality(value: int) -> attention.Quality:
    quality: attention.Quality = _enum(prefill_pb.Quality, value, "QUALITY_", attention.Quality)
    return quality


def _progress(message: prefill_pb.StageProgress) -> types.StageProgress:
    return types.StageProgress(
        stage=_enum(prefill_pb.Stage, message.stage, "STAGE_", types.Stage),
        rank=message.rank,
        done=message.done,
        total=message.total,
        elapsed_s=_seconds(message.elapsed),
    )


def _result(message: prefill_pb.PrefillResult) -> types.PrefillResult:
    return types.PrefillResult(
        prefix_id=message.prefix_id,
        prefix_tokens=message.prefix_tokens,
        video_tokens=message.video_tokens,
        frames=message.frames,
        grid_thw=tuple(message.grid_thw),
        position_delta=message.position_delta,
        shards=tuple(
            types.ShardRange(shard.start_token, shard.end_token, shard.rank)
            for shard in message.shards
        ),
        kv_bytes=message.kv_bytes,
        kv_transfer_params_json=message.kv_transfer_params_json,
        manifest_json=message.manifest_json,
        attention=_attention(message.attention) if message.HasField("attention") else None,
        communication=_communication(message.communication)
        if message.HasField("communication")
        else None,
        warnings=warnings(message.warnings),
        unlisted_frames=message.unlisted_frames,
    )


def _communication(message: prefill_pb.CommunicationReport) -> types.CommunicationReport:
    return types.CommunicationReport(
        message.exchange,
        tuple(
            types.CollectiveUse(use.name, use.calls, use.bytes_received, _seconds(use.elapsed))
            for use in message.collectives
        ),
    )


def _attention(message: prefill_pb.AttentionReport) -> attention.AttentionReport:
    return attention.AttentionReport(
        quality=_quality(message.quality),
        epsilon=message.epsilon,
        min_kept_mass=message.min_kept_mass,
        floor_met=message.floor_met,
        imbalance=message.imbalance,
        imbalance_before=message.imbalance_before,
        sparse_from_tokens=message.sparse_from_tokens,
        total=_measures(message.total),
        layers=tuple(
            attention.LayerAttention(
                layer.layer, _measures(layer.measures), tuple(layer.head_density)
            )
            for layer in message.layers
        ),
    )


def _measures(message: prefill_pb.AttentionMeasures) -> attention.AttentionMeasures:
    return attention.AttentionMeasures(
        density=message.density,
        sampled_rows=message.sampled_rows,
        kept_mass_mean=message.kept_mass_mean,
        kept_mass_p5=message.kept_mass_p5,
        kept_mass_min=message.kept_mass_min,
        output_error_mean=message.output_error_mean,
        output_error_p95=message.output_error_p95,
        tiles=message.tiles,
        tiles_redone=message.tiles_redone,
        tiles_dense=message.tiles_dense,
        select_s=_seconds(message.select),
        attend_s=_seconds(message.attend),
        certify_s=_seconds(message.certify),
    )


def inspection(message: prefill_pb.InspectPrefillJobResponse) -> types.Inspection:
    """Convert an InspectPrefillJobResponse."""
    return types.Inspection(
        job=job(message.job),
        attention=_attention(message.attention),
        block_map=_block_map(message.block_map) if message.HasField("block_map") else None,
        patches=tuple(
            attention.PatchAttention(_seconds(patch.time), patch.mass) for patch in message.patches
        ),
    )


def _block_map(message: prefill_pb.BlockMap) -> attention.BlockMap:
    cells = list(message.density)
    columns = message.columns
    return attention.BlockMap(
        message.layer,
        message.kv_head,
        tuple(tuple(cells[row * columns :][:columns]) for row in range(message.rows)),
    )


def intake(message: answer_pb.AskProgress) -> types.IntakeProgress:
    """Convert what an AskProgress says of vLLM."""
    return types.IntakeProgress(message.computed_tokens, message.prompt_tokens)


def timings(message: answer_pb.AskTimings) -> types.Timings:
    """Durations of an answer, in seconds."""
    return types.Timings(
        prefill_wait_s=_seconds(message.prefill_wait),
        decoder_first_token_s=_seconds(message.decoder_first_token),
        first_token_s=_seconds(message.first_token),
        total_s=_seconds(message.total),
        handoff_s=_seconds(message.handoff),
    )


def usage(message: answer_pb.AskUsage) -> types.Usage:
    """Token counts of an answer."""
    return types.Usage(
        prompt_tokens=message.prompt_tokens,
        video_tokens=message.video_tokens,
        completion_tokens=message.completion_tokens,
        kv_tokens_moved=message.kv_tokens_moved,
        kv_bytes_moved=message.kv_bytes_moved,
        cached_tokens=message.cached_tokens,
    )


def frames(final: answer_pb.AskFinal) -> types.SampledFrames | None:
    """The frames of an answer; None from a server that is older than the field."""
    if not final.HasField("frames"):
        return None
    return types.SampledFrames(tuple(final.frames.numbers), tuple(final.frames.seconds))
