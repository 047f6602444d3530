"""Between the messages of ``prefill.v1`` and our dataclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from prefill.v1 import answer_service_pb2, prefill_service_pb2, video_service_pb2

from prefill_service.api.convert_attention import (
    attention_to_proto,
    block_map_to_proto,
    duration,
    policy_from_proto,
    policy_to_proto,
)
from prefill_service.api.convert_comparison import comparison_from_proto, comparison_to_proto
from prefill_service.engine.messages import Progress
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.vllm_client import Sampling
from prefill_service.models.prefix_plan import FrameSampling
from prefill_service.scheduling.answers import (
    AnswerDelta,
    AnswerEvent,
    AnswerFinal,
    AnswerProgress,
    Question,
)
from prefill_service.scheduling.attention_summary import AttentionDetail
from prefill_service.scheduling.job import NO_POLICY, JobRecord, PrefillResult, PrefillSpec

if TYPE_CHECKING:
    from prefill_service.video.records import VideoRecord

T = TypeVar("T")

_ROLES = {answer_service_pb2.ROLE_USER: "user", answer_service_pb2.ROLE_ASSISTANT: "assistant"}


# ---- requests -----------------------------------------------------------------------------


def spec_from_proto(message: prefill_service_pb2.PrefillSpec, question: str = "") -> PrefillSpec:
    """A spec; whether the values of its sampling make sense is for the planner to say.

    Args:
        message: the spec.
        question: that is asked with it, if any.

    Raises:
        ServiceError: INVALID_REQUEST without a video id, or for an attention that cannot be;
            what ``comparison_from_proto`` raises.
    """
    if not message.video_id:
        raise ServiceError(Reason.INVALID_REQUEST, "spec.video_id is empty", name="spec.video_id")
    sampling = message.sampling
    comparison = comparison_from_proto(message, question)
    return PrefillSpec(
        message.video_id,
        FrameSampling(
            fps=_optional(sampling, "fps", sampling.fps),
            num_frames=_optional(sampling, "num_frames", sampling.num_frames),
            max_pixels=_optional(sampling, "max_pixels", sampling.max_pixels),
            min_pixels=_optional(sampling, "min_pixels", sampling.min_pixels),
            cap_pixels_per_frame=_optional(
                sampling, "cap_pixels_per_frame", sampling.cap_pixels_per_frame
            ),
        ),
        message.system_prompt,
        policy_from_proto(message.attention) if comparison is None else NO_POLICY,
        comparison,
    )


def question_from_proto(message: answer_service_pb2.AskRequest) -> Question:
    """A question.

    Raises:
        ServiceError: INVALID_REQUEST for a message without a role, or without a video id.
    """
    messages = []
    for number, turn in enumerate(message.messages):
        if turn.role not in _ROLES:
            raise ServiceError(
                Reason.INVALID_REQUEST,
                f"messages[{number}].role is {turn.role}; it must be ROLE_USER or ROLE_ASSISTANT",
                name=f"messages[{number}].role",
                value=turn.role,
            )
        messages.append((_ROLES[turn.role], turn.text))
    params = message.sampling_params
    return Question(
        spec_from_proto(message.spec, messages[0][1] if messages else ""),
        tuple(messages),
        Sampling(
            temperature=params.temperature,  # 0, greedy, if not set
            top_p=_optional(params, "top_p", params.top_p),
            top_k=_optional(params, "top_k", params.top_k),
            seed=_optional(params, "seed", params.seed),
            stop=tuple(params.stop),
            repetition_penalty=_optional(params, "repetition_penalty", params.repetition_penalty),
            ignore_eos=params.ignore_eos,
        ),
        max_tokens=_optional(params, "max_tokens", params.max_tokens),
    )


def _optional(message: Message, name: str, value: T) -> T | None:
    return value if message.HasField(name) else None


# ---- responses ----------------------------------------------------------------------------


def video_to_proto(record: VideoRecord) -> video_service_pb2.Video:
    """A video."""
    message = video_service_pb2.Video(
        video_id=record.video_id,
        display_name=record.display_name,
        state=f"VIDEO_STATE_{record.state}",
        size_bytes=record.size_bytes,
        committed_bytes=record.committed_bytes,
        sha256=record.sha256,
        create_time=_timestamp(record.create_time),
        expire_time=_timestamp(record.expire_time),
        error_reason=record.error_reason,
        error_message=record.error_message,
    )
    if record.info is not None:
        info = record.info
        message.info.CopyFrom(
            video_service_pb2.VideoInfo(
                container=info.container,
                codec=info.codec,
                width=info.width,
                height=info.height,
                frame_count=info.frame_count,
                fps=info.fps,
                duration=duration(info.duration_s),
                keyframe_count=info.keyframe_count,
            )
        )
    return message


def job_to_proto(job: JobRecord, brief: bool = False) -> prefill_service_pb2.PrefillJob:
    """A job; ``brief`` leaves out the two JSON texts and the report's layers of its result."""
    message = prefill_service_pb2.PrefillJob(
        job_id=job.job_id,
        spec=_spec_to_proto(job.spec),
        state=f"JOB_STATE_{job.state}",
        progress=[_progress_to_proto(progress) for progress in job.progress],
        attempts=job.attempts,
        queue_position=job.queue_position,
        create_time=_timestamp(job.create_time),
        start_time=_timestamp(job.start_time),
        end_time=_timestamp(job.end_time),
        prefix_tokens=job.prefix_tokens,
    )
    if job.error is not None:
        message.error.CopyFrom(prefill_service_pb2.JobError(**job.error))
    if job.result is not None:
        message.result.CopyFrom(_result_to_proto(job.result, brief))
    return message


def answer_to_proto(event: AnswerEvent) -> answer_service_pb2.AskResponse:
    """One message of an answer."""
    match event:
        case AnswerProgress(job):
            progress = answer_service_pb2.AskProgress(job=job_to_proto(job, brief=True))
            return answer_service_pb2.AskResponse(progress=progress)
        case AnswerDelta(text, token_ids):
            delta = answer_service_pb2.AskDelta(text=text, token_ids=token_ids)
            return answer_service_pb2.AskResponse(delta=delta)
        case AnswerFinal():
            return answer_service_pb2.AskResponse(final=_final_to_proto(event))


def _final_to_proto(final: AnswerFinal) -> answer_service_pb2.AskFinal:
    return answer_service_pb2.AskFinal(
        finish_reason=final.finish_reason,
        timings=answer_service_pb2.AskTimings(
            prefill_wait=duration(final.prefill_wait_s),
            decoder_first_token=duration(final.decoder_first_token_s),
            first_token=duration(final.first_token_s),
            total=duration(final.total_s),
            handoff=duration(final.handoff_s),
        ),
        usage=answer_service_pb2.AskUsage(
            prompt_tokens=final.prompt_tokens,
            video_tokens=final.video_tokens,
            completion_tokens=final.completion_tokens,
            kv_tokens_moved=final.kv_tokens_moved,
            kv_bytes_moved=final.kv_bytes_moved,
            cached_tokens=final.cached_tokens,
        ),
        job_id=final.job_id,
        prefix_id=final.prefix_id,
    )


def _spec_to_proto(spec: PrefillSpec) -> prefill_service_pb2.PrefillSpec:
    sampling = spec.sampling
    return prefill_service_pb2.PrefillSpec(
        video_id=spec.video_id,
        sampling=prefill_service_pb2.FrameSampling(
            fps=sampling.fps,
            num_frames=sampling.num_frames,
            max_pixels=sampling.max_pixels,
            min_pixels=sampling.min_pixels,
            cap_pixels_per_frame=sampling.cap_pixels_per_frame,
        ),
        system_prompt=spec.system_prompt,
        attention=policy_to_proto(spec.attention) if spec.comparison is None else None,
        comparison=comparison_to_proto(spec.comparison) if spec.comparison else None,
    )


def inspection_to_proto(
    job: JobRecord, detail: AttentionDetail
) -> prefill_service_pb2.InspectPrefillJobResponse:
    """All that is known of a job's attention."""
    return prefill_service_pb2.InspectPrefillJobResponse(
        job=job_to_proto(job, brief=True),
        attention=attention_to_proto(detail.summary),
        block_map=block_map_to_proto(detail.block_map) if detail.block_map else None,
        patches=[
            prefill_service_pb2.PatchAttention(time=duration(second), mass=mass)
            for second, mass in detail.patches
        ],
    )


def _progress_to_proto(progress: Progress) -> prefill_service_pb2.StageProgress:
    return prefill_service_pb2.StageProgress(
        stage=f"STAGE_{progress.stage.name}",
        rank=progress.rank,
        done=progress.done,
        total=progress.total,
        elapsed=duration(progress.elapsed_s),
    )


def _result_to_proto(result: PrefillResult, brief: bool) -> prefill_service_pb2.PrefillResult:
    return prefill_service_pb2.PrefillResult(
        prefix_id=result.prefix_id,
        prefix_tokens=result.prefix_tokens,
        video_tokens=result.video_tokens,
        frames=result.frames,
        grid_thw=result.grid_thw,
        position_delta=result.position_delta,
        shards=[
            prefill_service_pb2.ShardRange(start_token=start, end_token=end, rank=rank)
            for start, end, rank in result.shards
        ],
        kv_bytes=result.kv_bytes,
        kv_transfer_params_json="" if brief else result.kv_transfer_params_json,
        manifest_json="" if brief else result.manifest_json,
        attention=attention_to_proto(result.attention, brief) if result.attention else None,
        communication=_communication_to_proto(result) if result.exchange else None,
    )


def _communication_to_proto(result: PrefillResult) -> prefill_service_pb2.CommunicationReport:
    return prefill_service_pb2.CommunicationReport(
        exchange=result.exchange,
        collectives=[
            prefill_service_pb2.CollectiveUse(
                name=name,
                calls=use.calls,
                bytes_received=use.bytes_received,
                elapsed=duration(use.seconds),
            )
            for name, use in sorted(result.communication.items())
        ],
    )


def _timestamp(seconds: float) -> Timestamp | None:
    """``None``, which leaves the field unset, for 0."""
    if not seconds:
        return None
    message = Timestamp()
    message.FromNanoseconds(int(seconds * 1e9))
    return message
