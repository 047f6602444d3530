"""Which losses of ranks count against a job, and how often it is started."""

from __future__ import annotations

import asyncio

import pytest

from prefill_service.engine.task_state import TaskState
from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.retry_policy import RetryPolicy

FIRST, SECOND = Subgroup(0, 2), Subgroup(2, 2)


def starts(error: ServiceError, team: Subgroup) -> int:
    """Of a job on the team each of whose starts ends with the error."""
    attempts, count = RetryPolicy(team), 1
    while attempts.another(error, count):
        count += 1
    return count


async def not_stopped(team: Subgroup) -> ServiceError:
    """As the group raises it when the team's ranks do not stop a cancelled job."""
    running = TaskState("job_1", team, lambda _: None, asyncio.get_running_loop().create_future())
    return running.not_stopped(30.0)


@pytest.mark.parametrize("reason", [Reason.RANK_DIED, Reason.RANK_STALLED])
def test_a_lost_rank_counts_for_its_own(reason: Reason) -> None:
    error = ServiceError(reason, "rank 1 was lost", rank=1)
    assert (starts(error, FIRST), starts(error, SECOND)) == (2, 4)


async def test_ranks_that_do_not_stop_a_job_count_for_their_own() -> None:
    error = await not_stopped(SECOND)
    assert error.metadata == {"job_id": "job_1", "ranks": "[2, 3]"}
    assert (starts(error, FIRST), starts(error, SECOND)) == (4, 2)


def test_a_loss_without_a_rank_counts_for_all() -> None:
    assert starts(ServiceError(Reason.STALE_GENERATION, "the ranks are at 2"), FIRST) == 2


def test_what_is_no_loss_is_final() -> None:
    assert starts(ServiceError(Reason.DECODE_FAILED, "frame 7 is broken"), FIRST) == 1
