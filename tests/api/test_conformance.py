"""Every RPC of the protos does what every RPC must do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from prefill.v1 import answer_service_pb2, prefill_service_pb2, video_service_pb2

from prefill_service.api.answer_service import AnswerServicer
from prefill_service.api.prefill_service import PrefillServicer
from prefill_service.api.video_service import VideoServicer
from prefill_service.scheduling.metrics import Metrics
from tests.api.conformance import CHECKS, RpcCase, methods_of
from tests.api.odd_requests import least_request

# Fields that the first request needs, beyond those that every request does.
FIRST: dict[str, dict[str, Any]] = {"UploadChunks": {"video_id": "vid_x", "data": b"x"}}
FROM_MEMORY = {"GetPrefillJob", "ListPrefillJobs", "InspectPrefillJob", "TracePrefillJob"}


def cases() -> list[RpcCase]:
    services = (
        (video_service_pb2, "VideoService", lambda videos: VideoServicer(videos, Metrics())),
        (prefill_service_pb2, "PrefillService", PrefillServicer),
        (answer_service_pb2, "AnswerService", AnswerServicer),
    )
    found = []
    for module, name, make_servicer in services:
        for method in methods_of(module.DESCRIPTOR.services_by_name[name]):
            request = least_request(method)
            request.MergeFrom(type(request)(**FIRST.get(method.name, {})))
            waits = method.name not in FROM_MEMORY
            found.append(RpcCase(make_servicer, method, request, waits=waits))
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", cases(), ids=str)
async def test_rpc_conforms(case: RpcCase, check: Callable[[RpcCase], Awaitable[None]]) -> None:
    await check(case)
