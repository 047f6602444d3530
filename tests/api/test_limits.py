"""Every field of every request has a limit, and nothing beyond it gets past the API."""

from __future__ import annotations

import asyncio
import random
import resource
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prefill.v1 import answer_service_pb2 as answer_pb

from prefill_service.api.limit_kinds import Choice, Data, Flag, Items, Limit, Nested, Number
from prefill_service.api.limits import LIMITS, check_request
from prefill_service.errors import Reason, ServiceError
from prefill_service.models.checkpoint import open_checkpoint
from prefill_service.models.prefix_planner import PrefixPlanner
from prefill_service.scheduling.planner_threads import LONG_THREADS
from tests.api.odd_requests import (
    INTEGERS,
    METHODS,
    OddRequest,
    least_request,
    odd_requests,
    request_messages,
)
from tests.support.in_process_service import Template, answer, error_of, serving
from tests.support.simulated_backends import SimulatedExecutor, SimulatedGenerationServer

MIB = 1 << 20

# ---- the table ------------------------------------------------------------------------------


def test_the_table_has_every_field_and_no_others() -> None:
    messages = request_messages()
    assert set(LIMITS) == set(messages)
    for name, message in messages.items():
        assert set(LIMITS[name]) == {field.name for field in message.fields}, name


def fits(field: FieldDescriptor, limit: Limit) -> bool:
    """Whether a limit is one of a field's type and says no more than the field can hold."""
    match limit:
        case Nested():
            return field.message_type is not None
        case Choice():
            return limit.enum.DESCRIPTOR is field.enum_type
        case Flag():
            return field.type == FieldDescriptor.TYPE_BOOL
        case Data():
            return field.type == FieldDescriptor.TYPE_BYTES
        case Number():
            low, high = INTEGERS.get(field.cpp_type, (-1e308, 1e308))
            return low <= limit.low < limit.high <= high
        case _:
            return field.type == FieldDescriptor.TYPE_STRING


def test_limits_suit_their_fields() -> None:
    for name, message in request_messages().items():
        for field in message.fields:
            limit = LIMITS[name][field.name]
            element = limit.element if isinstance(limit, Items) else limit
            assert isinstance(limit, Items) == isinstance(
                getattr(GetMessageClass(message)(), field.name), _lists()
            ), f"{name}.{field.name}"
            assert fits(field, element), f"{name}.{field.name}"


def _lists() -> tuple[type, ...]:
    request = answer_pb.AskRequest()
    return type(request.messages), type(request.sampling_params.stop)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_least_request_is_accepted(method: MethodDescriptor) -> None:
    check_request(least_request(method))


def test_errors_name_the_field_its_value_and_what_is_accepted() -> None:
    request = answer_pb.AskRequest()
    request.spec.video_id = "vid_x"
    request.messages.add(role=answer_pb.ROLE_USER, text="What?")
    for change, name, message in (
        (
            answer_pb.AskRequest(messages=[{"role": 7}]),
            "messages[1].role",
            "messages[1].role is 7; it must be one of ROLE_USER, ROLE_ASSISTANT",
        ),
        (
            answer_pb.AskRequest(spec={"video_id": "v" * 100}),
            "spec.video_id",
            "spec.video_id is 100 bytes long; it must be 1 to 64 bytes",
        ),
        (
            answer_pb.AskRequest(spec={"sampling": {"fps": float("inf")}}),
            "spec.sampling.fps",
            "spec.sampling.fps is inf; it must be more than 0 and at most 10,000",
        ),
        (
            answer_pb.AskRequest(sampling_params={"stop": ["x"] * 17}),
            "sampling_params.stop",
            "sampling_params.stop is a list of 17; it must be at most 16 elements, "
            "each 1 to 1,024 bytes",
        ),
    ):
        changed = answer_pb.AskRequest()
        changed.CopyFrom(request)
        changed.MergeFrom(change)
        with pytest.raises(ServiceError) as caught:
            check_request(changed)
        assert caught.value.reason is Reason.INVALID_REQUEST
        assert caught.value.message == message
        assert caught.value.metadata["name"] == name
        assert set(caught.value.metadata) == {"name", "value", "accepted"}


# ---- over a socket --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner(checkpoint: Callable[..., Path]) -> PrefixPlanner:
    return PrefixPlanner(open_checkpoint(str(checkpoint("qwen3_vl"))), "float32")


def call(channel: grpc.aio.Channel, method: MethodDescriptor, requests: list[Any]) -> Any:
    """A call of a method with a request, or with a stream of them."""
    shape = f"{'stream' if method.client_streaming else 'unary'}_"
    shape += "stream" if method.server_streaming else "unary"
    stub = getattr(channel, shape)(
        f"/{method.containing_service.full_name}/{method.name}",
        request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )
    return stub(iter(requests) if method.client_streaming else requests[0], timeout=60)


async def outcome(channel: grpc.aio.Channel, method: MethodDescriptor, request: Any) -> Any:
    """The reason, its metadata and the status that a call ends with; "OK" without an error."""
    started = call(channel, method, [request])
    try:
        if method.server_streaming:
            async for _ in started:
                pass
        else:
            await started
    except grpc.aio.AioRpcError as error:
        failed: asyncio.Future[None] = asyncio.Future()
        failed.set_exception(error)
        status, reason, metadata, _ = await error_of(failed)
        return reason, metadata, status
    return "OK", {}, grpc.StatusCode.OK


def neighbour(video_id: str) -> answer_pb.AskRequest:
    request = answer_pb.AskRequest(spec={"video_id": video_id})
    request.messages.add(role=answer_pb.ROLE_USER, text="What happens?")
    return request


def base_of(method: MethodDescriptor, video_id: str) -> Any:
    """A request that could be answered, so that odd values get as far as they can."""
    request = least_request(method)
    if hasattr(request, "spec"):
        request.spec.video_id = video_id
    if hasattr(request, "messages"):
        request.messages.add(role=answer_pb.ROLE_USER, text="What?")
    return request


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


async def test_odd_values_of_every_field_are_refused_or_served(
    tmp_path: Path, template: Template, planner: PrefixPlanner
) -> None:
    async with serving(
        tmp_path / "data", template, components={"planner": planner}, engine={"max_queued_jobs": 8}
    ) as s:
        await answer(s.answers.Ask(neighbour(s.video_id)))  # its prefix is ready from here on
        before = peak_memory()
        wrong = []

        async def send(odd: OddRequest) -> None:
            reason, metadata, status = await outcome(s.channel, odd.method, odd.message)
            bad = status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
            if bad or reason in ("", "INTERNAL") or (reason == "OK" and not odd.legal):
                wrong.append(f"{odd}: {status.name} {reason}")
            elif not odd.legal and (
                reason != "INVALID_REQUEST" or not metadata["name"].startswith(odd.path)
            ):
                wrong.append(f"{odd}: {reason} {metadata}")

        def all_of_them() -> Iterator[OddRequest]:
            for method in METHODS:
                video_id = "vid_x" if method.name == "DeleteVideo" else s.video_id
                yield from odd_requests(method, partial(base_of, method, video_id))

        sent = 0
        for odd in all_of_them():
            await send(odd)
            sent += 1
        assert wrong == []
        assert sent > 400
        assert peak_memory() - before < 256 * MIB
        assert (await answer(s.answers.Ask(neighbour(s.video_id)))).text


async def test_bytes_that_are_no_message_are_invalid_requests(
    tmp_path: Path, template: Template
) -> None:
    none = b"\xff" * 100  # of any type
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].methods
    async with serving(tmp_path / "data", template) as s:
        for method in METHODS:
            chance = random.Random(method.name)
            spoilt = [chance.randbytes(chance.randrange(1, 40)) for _ in range(20)]
            for data in (*spoilt, b"\x0a\x02\xed\xa0", b"\x0a\xff\xff\xff\xff\x0f"):
                _, _, status = await outcome(s.channel, method, data)
                assert status not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), data
        for method in (*METHODS, *health):
            assert (await outcome(s.channel, method, none))[0] == "INVALID_REQUEST", method.name
        watch = health_pb2_grpc.HealthStub(s.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


class StuckPlanner:
    """A planner whose plans with a system prompt do not end before ``released``."""

    def __init__(self, planner: PrefixPlanner) -> None:
        self._planner = planner
        self.begun = 0
        self.released = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def plan(self, *arguments: Any, **named: Any) -> Any:
        if arguments[3]:
            self.begun += 1
            self.released.wait()
        return self._planner.plan(*arguments, **named)


async def test_plans_that_do_not_end_delay_nobody_elses_answer(
    tmp_path: Path, template: Template, planner: PrefixPlanner
) -> None:
    stuck = StuckPlanner(planner)
    executor = SimulatedExecutor()
    generation = SimulatedGenerationServer(executor, max_model_len=1 << 20)
    async with serving(
        tmp_path / "data", template, executor, generation, components={"planner": stuck}
    ) as s:
        try:
            await answer(s.answers.Ask(neighbour(s.video_id)))
            silly = []
            for number in range(4 * LONG_THREADS):
                request = neighbour(s.video_id)
                request.spec.system_prompt = f"{number} " + "word " * 8000
                silly.append(s.answers.Ask(request))
            waiting = [asyncio.create_task(error_of(answer(one))) for one in silly]
            await s.until(lambda: stuck.begun == LONG_THREADS)
            assert (await answer(s.answers.Ask(neighbour(s.video_id)))).text  # its prefix is ready
            other = neighbour(s.video_id)
            other.spec.sampling.num_frames = 4
            assert (await answer(s.answers.Ask(other))).text  # a plan of its own
            assert not any(task.done() for task in waiting)
            for one in silly:
                one.cancel()
            await asyncio.wait(waiting)
            await answer(s.answers.Ask(neighbour(s.video_id)))  # they have ended in the server too
            stuck.released.set()
            last = neighbour(s.video_id)
            last.spec.system_prompt = "word " * 8000
            assert (await answer(s.answers.Ask(last))).text
            assert stuck.begun == LONG_THREADS + 1  # calls that end give their turn away
        finally:
            stuck.released.set()
