"""What the SDK never sends: bytes that are no message, texts that are not UTF-8, bad numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as prefill_pb
from prefill.v1 import video_service_pb2 as video_pb

from prefill_service.api.limits import check_request
from prefill_service.errors import ServiceError
from tests.support.in_process_service import answer, error_of

Serve = Callable[..., Any]

HALF = b"\xed\xa0\xbd"  # a lone surrogate, as lenient encoders write it
TEXT = "XXX"


def spoilt(message: Message) -> bytes:
    return message.SerializeToString().replace(TEXT.encode(), HALF)


async def test_a_text_that_is_not_utf8_is_named(serve: Serve) -> None:
    async with serve() as s:
        ask = answer_pb.AskRequest(spec=s.spec())
        ask.messages.add(role=answer_pb.ROLE_USER, text="What?")
        ask.messages.add(role=answer_pb.ROLE_ASSISTANT, text="")
        ask.messages[1].text = f"A {TEXT}"
        prompt = prefill_pb.CreatePrefillJobRequest(spec=s.spec(system_prompt=TEXT))
        stop = answer_pb.AskRequest(
            spec=s.spec(), sampling_params=answer_pb.SamplingParams(stop=["a", TEXT])
        )
        for method, request, name in (
            ("AnswerService/Ask", ask, "messages[1].text"),
            ("AnswerService/Ask", stop, "sampling_params.stop[1]"),
            ("PrefillService/CreatePrefillJob", prompt, "spec.system_prompt"),
            (
                "PrefillService/GetPrefillJob",
                prefill_pb.GetPrefillJobRequest(job_id=TEXT),
                "job_id",
            ),
            ("VideoService/ImportVideo", video_pb.ImportVideoRequest(path=TEXT), "path"),
        ):
            call = s.channel.unary_unary(f"/prefill.v1.{method}")(spoilt(request))
            code, reason, metadata, _ = await error_of(call)
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert (metadata["name"], metadata["accepted"]) == (name, "UTF-8")
            with pytest.raises(
                grpc.aio.AioRpcError, match=r"is not UTF-8: byte [02] of [35] is 0xed"
            ):
                await s.channel.unary_unary(f"/prefill.v1.{method}")(spoilt(request))

        def chunks() -> Iterator[bytes]:
            yield spoilt(video_pb.UploadChunksRequest(video_id=TEXT))

        upload = s.channel.stream_unary("/prefill.v1.VideoService/UploadChunks")
        code, _, metadata, _ = await error_of(upload(chunks()))
        assert (code, metadata["name"]) == (grpc.StatusCode.INVALID_ARGUMENT, "video_id")
        assert s.executor.started == []
        assert (await answer(s.ask())).text  # it still serves


async def test_bytes_that_are_no_message(serve: Serve) -> None:
    async with serve() as s:
        for method in ("AnswerService/Ask", "VideoService/ListVideos"):
            code, reason, metadata, _ = await error_of(
                s.channel.unary_unary(f"/prefill.v1.{method}")(b"\xff\xff\xff")
            )
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
            assert metadata["name"].startswith("prefill.v1.")


async def test_numbers_out_of_range(serve: Serve) -> None:
    async with serve() as s:
        ask = dict[str, Any](
            seed=-1,
            max_tokens=0,
            temperature=math.nan,
            top_p=math.inf,
            top_k=-2,
            repetition_penalty=-math.inf,
        )
        calls: dict[str, Any] = {
            f"sampling_params.{name}": s.ask(**{name: value}).read() for name, value in ask.items()
        }
        calls["page_size"] = s.videos.ListVideos(video_pb.ListVideosRequest(page_size=-1))
        for name, call in calls.items():
            code, reason, metadata, _ = await error_of(call)
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), name
            assert metadata["name"] == name
            assert set(metadata) == {"name", "value", "accepted"}
        for request in (
            video_pb.CreateUploadRequest(size_bytes=-1, sha256="a" * 64),
            video_pb.CreateUploadRequest(size_bytes=1, sha256="a" * 64, display_name="\0" * 9000),
        ):
            code, reason, _, _ = await error_of(s.videos.CreateUpload(request))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
        call = s.videos.ImportVideo(video_pb.ImportVideoRequest(path="/a\0b"))
        assert (await error_of(call))[0] in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.PERMISSION_DENIED,
        )


def test_the_sdk_accepts_what_the_server_accepts() -> None:
    from prefill_client import ArgumentError
    from prefill_client._requests import build_ask

    def served(name: str, value: Any) -> bool:
        request = answer_pb.AskRequest(spec={"video_id": "vid_1"})
        parts = (request.sampling_params, request.spec.sampling, request.spec.attention)
        [part] = [part for part in parts if name in part.DESCRIPTOR.fields_by_name]
        part.MergeFrom(type(part)(**{name: value}))
        try:
            check_request(request)
        except ServiceError:
            return False
        return True

    def sent(name: str, value: Any) -> bool:
        try:
            build_ask("vid_1", "What?", {name: value}, "")  # type: ignore[misc]
        except ArgumentError:
            return False
        return True

    for name, values in {
        "seed": (-(2**63), -1, 0, 1, 2**63 - 1),
        "max_tokens": (-1, 0, 1, 2**31 - 1),
        "temperature": (-0.1, 0.0, 100.0, 100.1, math.nan, math.inf),
        "top_p": (-0.1, 0.0, 0.5, 1.0, 1.1, math.nan),
        "top_k": (-2, -1, 0, 2**31 - 1),
        "repetition_penalty": (-1.0, 0.0, 0.5, 100.0, 101.0, math.nan),
        "stop": ([], ["x"], [""], ["x"] * 16, ["x"] * 17, ["x" * 1024], ["é" * 513]),
        "fps": (-1.0, 0.0, 5e-324, 10_000.0, 10_001.0, math.nan, math.inf),
        "num_frames": (-1, 0, 1, 2**31 - 1),
        "max_frames": (-1, 0, 1, 2**31 - 1),
        "max_pixels": (0, 1, 2**44, 2**44 + 1, 2**63 - 1),
        "min_pixels": (0, 1, 2**44, 2**44 + 1, 2**63 - 1),
        "epsilon": (-0.1, 0.0, 0.999, 1.0, math.nan),
        "min_kept_mass": (-0.1, 0.0, 1.0, 1.1, math.nan),
    }.items():
        for value in values:
            assert sent(name, value) == served(name, value), (name, value)
