"""Names that the protos, the service and the client have in common are the same everywhere."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import prefill_client
import pytest
from prefill.v1 import answer_service_pb2, prefill_service_pb2, video_service_pb2

from prefill_service.api import answer_service
from prefill_service.attention.quality import Quality, resolve_policy
from prefill_service.engine.messages import Stage
from prefill_service.errors import Reason
from prefill_service.parallel.baselines.methods import BaselineName
from prefill_service.scheduling.job import JobState
from prefill_service.video.records import VideoState

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    (prefill_service_pb2.Quality, "QUALITY", Quality, prefill_client.Quality),
    (
        prefill_service_pb2.ComparisonMethod,
        "COMPARISON_METHOD",
        BaselineName,
        prefill_client.ComparisonMethod,
    ),
    (prefill_service_pb2.JobState, "JOB_STATE", JobState, prefill_client.JobState),
    (prefill_service_pb2.Stage, "STAGE", Stage, prefill_client.Stage),
    (video_service_pb2.VideoState, "VIDEO_STATE", VideoState, prefill_client.VideoState),
]


def members(prefix: str, proto: Any) -> set[str]:
    return {name.removeprefix(f"{prefix}_") for name in proto.keys()} - {"UNSPECIFIED"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("proto", "prefix", "ours", "theirs"), PAIRS, ids=[prefix for _, prefix, *_ in PAIRS]
)
def test_enums_have_the_same_members(
    proto: Any, prefix: str, ours: type[Enum], theirs: type[Enum]
) -> None:
    assert {member.name for member in ours} == members(prefix, proto)
    assert {member.name for member in theirs} - {"UNSPECIFIED"} == members(prefix, proto)


def test_every_role_has_a_name_for_the_model() -> None:
    named = {answer_service_pb2.Role.Name(role) for role in answer_service._ROLES}
    assert named == set(answer_service_pb2.Role.keys()) - {"ROLE_UNSPECIFIED"}


def test_the_documentation_lists_every_reason_a_client_can_get() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    section = text[text.index("## Errors") : text.index("## Deadlines")]
    listed = set(re.findall(r"`([A-Z_]+)`", "\n".join(re.findall(r"^\|.*", section, re.M))))
    at_start_only = {"CONFIG_INVALID", "PORT_IN_USE"}
    assert {reason.value for reason in Reason} - at_start_only <= listed


def test_the_documentation_has_the_quality_dial() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `QUALITY_(\w+)`[^|]*\| ([^|]+) \| ([^|]+) \|$", text, re.M)
    assert {name for name, _, _ in rows} == members("QUALITY", prefill_service_pb2.Quality)
    for name, epsilon, floor in rows:
        if name != "CUSTOM":
            policy = resolve_policy(Quality[name])
            assert (float(epsilon), float(floor)) == (policy.epsilon, policy.min_kept_mass)
