"""Which losses of ranks count against a job, and how often it is started."""

from __future__ import annotations

import asyncio

import pytest

from prefill_service.engine.task_state import TaskState
from prefill_service.errors import Reason, ServiceError
from prefill_service.parallel.subgroups import Subgroup
from prefill_service.scheduling.runner import RetryPolicy

FIRST = Subgroup(0, 2)
SECOND = Subgroup(2, 2)


def starts(error: ServiceError, subgroup: Subgroup) -> int:
    """How often a job on the subgroup is started each of whose starts ends with the error."""
    retries = RetryPolicy(subgroup)
    count = 1
    while retries.should_retry(error, count):
        count += 1
    return count


async def not_stopped(subgroup: Subgroup) -> ServiceError:
    """The error that the executor raises when the subgroup's ranks do not stop a cancelled job."""
    state = TaskState("job_1", subgroup, lambda _: None, asyncio.get_running_loop().create_future())
    return state.not_stopped(30.0)


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
