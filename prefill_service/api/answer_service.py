"""``prefill.v1.AnswerService``, for answers: questions about a video, and tokens streamed back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from prefill.v1 import answer_service_pb2 as pb
from prefill.v1 import answer_service_pb2_grpc
from typing_extensions import override

from prefill_service.api.optional_fields import optional_field
from prefill_service.api.prefill_service import job_to_proto, spec_from_proto
from prefill_service.api.servicer import Context, Servicer
from prefill_service.api.time_messages import duration_to_proto
from prefill_service.api.video_service import warnings_to_proto
from prefill_service.generation.vllm_client import Sampling
from prefill_service.scheduling.answering.answer_events import (
    AnswerDelta,
    AnswerEvent,
    AnswerFinal,
    AnswerProgress,
    Question,
)
from prefill_service.scheduling.answering.answers import Answers

_ROLES = {pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}


class AnswerServicer(answer_service_pb2_grpc.AnswerServiceServicer, Servicer):
    """Questions and their answers over gRPC."""

    service_name = pb.DESCRIPTOR.services_by_name["AnswerService"].full_name

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    @override
    def register_handlers(self, server: grpc.aio.Server) -> None:
        answer_service_pb2_grpc.add_AnswerServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Ask(self, request: pb.AskRequest, context: Context) -> AsyncIterator[pb.AskResponse]:
        """Stream progress, then pieces of the answer, then one final message."""
        async with aclosing(self._answers.ask(question_from_proto(request))) as events:
            async for event in events:
                yield answer_to_proto(event)


def question_from_proto(message: pb.AskRequest) -> Question:
    """The question of a request.

    Raises:
        ServiceError: what ``spec_from_proto`` raises.
    """
    messages = [(_ROLES[turn.role], turn.text) for turn in message.messages]
    params = message.sampling_params
    return Question(
        spec=spec_from_proto(message.spec, messages[0][1] if messages else ""),
        messages=tuple(messages),
        sampling=Sampling(
            temperature=optional_field(params, "temperature"),
            top_p=optional_field(params, "top_p"),
            top_k=optional_field(params, "top_k"),
            seed=optional_field(params, "seed"),
            stop=tuple(params.stop),
            repetition_penalty=optional_field(params, "repetition_penalty"),
            ignore_eos=params.ignore_eos,
        ),
        max_tokens=optional_field(params, "max_tokens"),
    )


def answer_to_proto(event: AnswerEvent) -> pb.AskResponse:
    """The message for one event of an answer."""
    match event:
        case AnswerProgress():
            progress = pb.AskProgress(
                job=job_to_proto(event.job, brief=True),
                computed_tokens=event.computed_tokens,
                prompt_tokens=event.prompt_tokens,
            )
            return pb.AskResponse(progress=progress)
        case AnswerDelta(text, token_ids):
            delta = pb.AskDelta(text=text, token_ids=token_ids)
            return pb.AskResponse(delta=delta)
        case AnswerFinal():
            return pb.AskResponse(final=_final_to_proto(event))


def _final_to_proto(final: AnswerFinal) -> pb.AskFinal:
    return pb.AskFinal(
        finish_reason=final.finish_reason,
        timings=pb.AskTimings(
            prefill_wait=duration_to_proto(final.prefill_wait_s),
            decoder_first_token=duration_to_proto(final.decoder_first_token_s),
            first_token=duration_to_proto(final.first_token_s),
            total=duration_to_proto(final.total_s),
            handoff=duration_to_proto(final.handoff_s),
        ),
        usage=pb.AskUsage(
            prompt_tokens=final.prompt_tokens,
            video_tokens=final.video_tokens,
            completion_tokens=final.completion_tokens,
            kv_tokens_moved=final.kv_tokens_moved,
            kv_bytes_moved=final.kv_bytes_moved,
            cached_tokens=final.cached_tokens,
        ),
        job_id=final.job_id,
        prefix_id=final.prefix_id,
        warnings=warnings_to_proto(final.warnings),
        frames=pb.SampledFrames(
            numbers=final.frame_indices.tolist(), seconds=final.frame_seconds.tolist()
        ),
    )
