"""BaselineName modes per request: refusals, identity, what reaches the ranks, what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import grpc
import pytest
from prefill.v1 import answer_service_pb2 as answer_pb
from prefill.v1 import prefill_service_pb2 as pb

from prefill_service.parallel.baselines.methods import BaselineMethod, BaselineName, PassingScore
from prefill_service.scheduling.baseline_spec import BaselineSpec
from prefill_service.scheduling.job import NO_POLICY, PrefillSpec
from tests.support.in_process_service import InProcessService, answer, error_of
from tests.support.simulated_backends import TOKENS_PER_FRAME

Serve = Callable[..., Any]
RANKS = {"ranks": 2}


def spec(s: InProcessService, frames: int = 12, **comparison: Any) -> pb.PrefillSpec:
    message = s.spec(frames)
    message.comparison.CopyFrom(pb.ComparisonSpec(**comparison))
    return message


async def create(s: InProcessService, message: pb.PrefillSpec) -> pb.PrefillJob:
    request = pb.CreatePrefillJobRequest(spec=message)
    return (await s.prefills.CreatePrefillJob(request)).job


SPAVA: dict[str, Any] = {
    "method": pb.COMPARISON_METHOD_SPAVA,
    "question": "Who?",
    "anchor_tokens": 40,
    "passing_tokens": 5,
}


async def test_a_job_is_computed_as_asked(serve: Serve) -> None:
    async with serve(engine=RANKS) as s:
        (*_, job) = await s.ended((await create(s, spec(s, **SPAVA))).job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED
        assert job.spec == spec(s, **SPAVA)  # in a form that may be asked again
        assert (await create(s, job.spec)).job_id == job.job_id
        how = s.executor.tasks[-1].baseline
        assert how.method == BaselineMethod(
            name=BaselineName.SPAVA, anchor_tokens=40, passing_tokens=5, score=PassingScore.MEAN
        )
        assert how.question_ids == tuple(map(ord, "Who?"))
        # Two patches of anchor in two slices, then a block each, twice.
        ranges = [(r.start_token, r.end_token, r.rank) for r in job.result.shards]
        assert ranges == [
            (0, 32, 0),
            (32, 64, 1),
            (64, 96, 0),
            (96, 128, 1),
            (128, 160, 1),
            (160, 192, 0),
        ]
        assert not job.result.HasField("attention")
        assert job.result.communication.exchange == "spava"
        assert '"profile":"spava:anchor_tokens=40' in job.result.manifest_json
        request = pb.InspectPrefillJobRequest(job_id=job.job_id)
        code, reason, _, _ = await error_of(s.prefills.InspectPrefillJob(request))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_ATTENTION_REPORT")


async def test_every_part_of_it_makes_another_prefix(serve: Serve) -> None:
    async with serve(engine=RANKS) as s:
        changes: list[dict[str, Any]] = [
            {},
            {"question": "What?"},
            {"anchor_tokens": 60},
            {"passing_tokens": 6},
            {"method": pb.COMPARISON_METHOD_APB},
        ]
        specs = [spec(s, **{**SPAVA, **change}) for change in changes]
        ids = [(await create(s, message)).job_id for message in [*specs, s.spec(12)]]
        assert len(set(ids)) == len(ids)
        spava = BaselineSpec(BaselineName.SPAVA, "Who?")
        assert spava.attention_key(2) != spava.attention_key(3)


async def test_an_answer_consults_its_own_question(serve: Serve) -> None:
    async with serve(engine=RANKS) as s:
        request = answer_pb.AskRequest(
            spec=spec(s, method=pb.COMPARISON_METHOD_STAR),
            messages=[answer_pb.ChatMessage(role=answer_pb.ROLE_USER, text="Where?")],
        )
        got = await answer(s.answers.Ask(request, timeout=20))
        assert got.final.finish_reason
        how = s.executor.tasks[-1].baseline
        assert how.question_ids == tuple(map(ord, "Where?"))
        assert how.method.anchor_tokens == 12 * TOKENS_PER_FRAME // 3  # as published


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        ({"question": " "}, "QUESTION_EMPTY", "comparison.question is empty"),
        (
            {"method": 0},
            "INVALID_REQUEST",
            "it must be one of COMPARISON_METHOD_SPAVA",
        ),
        ({"method": 9}, "INVALID_REQUEST", "method is 9"),
        ({"anchor_tokens": -1}, "INVALID_REQUEST", "anchor_tokens is -1; it must be 0 to"),
        ({"anchor_tokens": 100}, "INVALID_REQUEST", "6 temporal patches is too short for spava"),
        ({"method": pb.COMPARISON_METHOD_STAR}, "INVALID_REQUEST", "star passes no tokens on, 5"),
    ],
)
async def test_what_cannot_be_is_refused_at_once(
    serve: Serve, change: dict[str, Any], reason: str, text: str
) -> None:
    async with serve(engine=RANKS) as s:
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await create(s, spec(s, **{**SPAVA, **change}))
        assert text in str(info.value.details())
        assert (await error_of(create(s, spec(s, **{**SPAVA, **change}))))[1] == reason


async def test_the_dial_and_a_method_exclude_each_other(serve: Serve) -> None:
    async with serve(engine=RANKS) as s:
        message = spec(s, **SPAVA)
        message.attention.quality = pb.QUALITY_FAST
        with pytest.raises(grpc.aio.AioRpcError, match="exclude each other"):
            await create(s, message)


def test_specs_survive_the_database() -> None:
    found = PrefillSpec(
        "v", attention=NO_POLICY, comparison=BaselineSpec(BaselineName.APB, "Who?", 3, None)
    )
    assert PrefillSpec.from_dict(asdict(found)) == found
    older = asdict(PrefillSpec("v"))
    del older["comparison"]
    assert PrefillSpec.from_dict(older) == PrefillSpec("v")
