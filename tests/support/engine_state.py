"""What tests ask of the engine that the product never does."""

from __future__ import annotations

from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.preemption import Allocation, RankAllocator
from prefill_service.engine.supervisor import WorkerSupervisor
from prefill_service.parallel.subgroups import Subgroup


def worker_pids(supervisor: WorkerSupervisor) -> tuple[int, ...]:
    """Process ids by rank."""
    return tuple(worker.pid for worker in supervisor._workers)


def allocated(allocator: RankAllocator) -> tuple[Allocation, ...]:
    """The tasks that have their ranks, paused ones included."""
    return tuple(allocator._allocated)


def has_no_task(allocator: RankAllocator) -> bool:
    """Whether no task has ranks or waits for some."""
    return not allocator._allocated and not allocator._waiting


def subgroups_of_tasks(executor: PrefillExecutor) -> dict[str, Subgroup]:
    """Of the jobs that were sent to ranks, by their ids."""
    return {job_id: state.subgroup for job_id, state in executor._tasks.items()}


def is_idle(executor: PrefillExecutor) -> bool:
    """Whether no task runs or waits for ranks."""
    return not executor._tasks and has_no_task(executor._allocator)
