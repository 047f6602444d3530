"""``prefill.v1.AnswerService``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from prefill.v1 import answer_service_pb2 as pb
from prefill.v1 import answer_service_pb2_grpc

from prefill_service.api.convert import answer_to_proto, question_from_proto
from prefill_service.api.types import Context
from prefill_service.scheduling.answers import Answers


class AnswerServicer(answer_service_pb2_grpc.AnswerServiceServicer):
    """Answers over gRPC."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def Ask(self, request: pb.AskRequest, context: Context) -> AsyncIterator[pb.AskResponse]:
        """Progress, tokens, the end."""
        async with aclosing(self._answers.ask(question_from_proto(request))) as events:
            async for event in events:
                yield answer_to_proto(event)
