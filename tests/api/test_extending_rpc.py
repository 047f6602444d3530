"""The recipe "Add an RPC" of docs/extending.md, followed with a toy service in this one file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass

from prefill_service.api import limits
from prefill_service.api.limit_kinds import Text, Uuid
from prefill_service.api.servicer import Context
from tests.api.conformance import CHECKS, RpcCase, connected
from tests.support.in_process_service import error_of


def toy_proto() -> FileDescriptorProto:
    """What ``toy_service.proto`` would say."""
    file = FileDescriptorProto(
        name="prefill/v1/toy_service.proto", package="prefill.v1", syntax="proto3"
    )
    optional = FieldDescriptorProto.LABEL_OPTIONAL
    for message, fields in (
        ("CountWordsRequest", ("text", "request_id")),
        ("CountWordsResponse", ("count",)),
        ("ListWordsRequest", ("text",)),
        ("ListWordsResponse", ("word",)),
    ):
        made = file.message_type.add(name=message)
        for number, name in enumerate(fields, start=1):
            kind = FieldDescriptorProto.TYPE_STRING
            if name == "count":
                kind = FieldDescriptorProto.TYPE_INT32
            made.field.add(name=name, number=number, type=kind, label=optional)
    service = file.service.add(name="ToyService")
    for name, streams in (("CountWords", False), ("ListWords", True)):
        service.method.add(
            name=name,
            input_type=f".prefill.v1.{name}Request",
            output_type=f".prefill.v1.{name}Response",
            server_streaming=streams,
        )
    return file


Default().AddSerializedFile(toy_proto().SerializeToString())
TOY = Default().FindServiceByName("prefill.v1.ToyService")
COUNT = TOY.methods_by_name["CountWords"]
LIST = TOY.methods_by_name["ListWords"]
CountWordsRequest = GetMessageClass(COUNT.input_type)
CountWordsResponse = GetMessageClass(COUNT.output_type)
ListWordsRequest = GetMessageClass(LIST.input_type)
ListWordsResponse = GetMessageClass(LIST.output_type)


class Words:
    """What the toy's handlers call."""

    async def count(self, text: str) -> int:
        return len(text.split())

    async def each(self, text: str) -> AsyncIterator[str]:
        for word in text.split():
            yield word


class ToyServicer:
    """Words of a text over gRPC."""

    service_name = TOY.full_name

    def __init__(self, words: Words) -> None:
        self._words = words

    def register_handlers(self, server: grpc.aio.Server) -> None:
        """What generated stubs would do."""
        handlers = {
            "CountWords": grpc.unary_unary_rpc_method_handler(
                self.CountWords,
                request_deserializer=CountWordsRequest.FromString,
                response_serializer=CountWordsResponse.SerializeToString,
            ),
            "ListWords": grpc.unary_stream_rpc_method_handler(
                self.ListWords,
                request_deserializer=ListWordsRequest.FromString,
                response_serializer=ListWordsResponse.SerializeToString,
            ),
        }
        service = grpc.method_handlers_generic_handler(self.service_name, handlers)
        server.add_generic_rpc_handlers((service,))

    async def CountWords(self, request: Any, context: Context) -> Any:
        return CountWordsResponse(count=await self._words.count(request.text))

    async def ListWords(self, request: Any, context: Context) -> AsyncIterator[Any]:
        async for word in self._words.each(request.text):
            yield ListWordsResponse(word=word)


LIMITS = {
    "CountWordsRequest": {"text": Text(100), "request_id": Uuid()},
    "ListWordsRequest": {"text": Text(100)},
}


@pytest.fixture(autouse=True)
def toy_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LIMITS", {**limits.LIMITS, **LIMITS})


CASES = [
    RpcCase(ToyServicer, COUNT, CountWordsRequest(text="a red car")),
    RpcCase(ToyServicer, LIST, ListWordsRequest(text="a red car")),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_toy_conforms(case: RpcCase, check: Callable[[RpcCase], Awaitable[None]]) -> None:
    await check(case)


async def test_toy_answers() -> None:
    async with connected(CASES[0], Words()) as connection:
        assert (await connection.call()).count == 3
        code, _, metadata, _ = await error_of(connection.call(CountWordsRequest(text="a" * 101)))
        assert (code, metadata["name"]) == (grpc.StatusCode.INVALID_ARGUMENT, "text")
    async with connected(CASES[1], Words()) as connection:
        assert [response.word for response in await connection.call()] == ["a", "red", "car"]
