"""Ranks that cannot even be started."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine.executor import PrefillExecutor
from prefill_service.engine.messages import WorkerReady
from prefill_service.errors import Reason, ServiceError
from tests.support.checkpoints import described_checkpoint


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrefillExecutor:
    """An executor whose interpreter is gone."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    checkpoint = described_checkpoint(tmp_path, num_layers=2, q_heads=2, kv_heads=1)
    return PrefillExecutor(
        EngineConfig(),
        VideoConfig(),
        checkpoint,
        "float32",
        device="cpu",
        runtime_dir=tmp_path / "run",
    )


def test_later_epochs_do_not_measure_the_crossover_again(
    executor: PrefillExecutor, tmp_path: Path
) -> None:
    """A second measurement may find another length, and the same request another answer."""
    supervisor = executor.supervisor
    assert supervisor._make_spec(0, 0, tmp_path).engine.sparse_from_tokens == 0
    ready = WorkerReady(rank=0, endpoint="", device="cpu", sparse_from_tokens=2048, observed=())
    supervisor._become_ready(ready)
    assert supervisor.crossover == 2048
    assert supervisor._make_spec(0, 1, tmp_path).engine.sparse_from_tokens == 2048


async def test_start_says_which_rank(executor: PrefillExecutor) -> None:
    with pytest.raises(ServiceError, match=r"rank 0 cannot be started.*no-python") as error:
        await executor.supervisor.start()
    assert error.value.reason is Reason.RANK_DIED
    assert not executor.supervisor.ready


async def test_restart_gives_up_and_tells_those_who_wait(executor: PrefillExecutor) -> None:
    waiter = asyncio.create_task(executor.supervisor.wait_ready())
    await executor.supervisor.restart()
    with pytest.raises(ServiceError, match="rank 0 cannot be started"):
        await asyncio.wait_for(waiter, 30)
    assert not executor.supervisor.ready
    await executor.supervisor.stop()


async def test_a_full_temporary_folder_is_tried_again_until_it_is_emptied(
    executor: PrefillExecutor, tmp_path: Path
) -> None:
    """Other failures are given up after three starts; a full disk can be emptied."""
    supervisor = executor.supervisor
    full = ServiceError(Reason.STORAGE_FULL, "the disk is full")
    for _ in range(4):
        supervisor.declare_lost(full)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(supervisor.wait_ready(), 0.01)
    await supervisor.stop()


async def test_a_folder_that_cannot_be_made_is_named(
    executor: PrefillExecutor, tmp_path: Path
) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ServiceError, match=r"the ranks cannot be started: .*run: ") as error:
        await executor.supervisor.start()
    assert error.value.reason is Reason.RANK_DIED
