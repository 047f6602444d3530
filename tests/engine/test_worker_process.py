"""A rank process as its front end has it: whatever the process does, sending waits for nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from prefill_service.config import EngineConfig, VideoConfig
from prefill_service.engine import messages as msg
from prefill_service.engine.processes import fork_server
from prefill_service.engine.processes.fork_server import ForkServer
from prefill_service.engine.processes.worker_process import WorkerProcess
from tests.support.checkpoints import described_checkpoint

BYTES = 8 << 20
"""Far more than a socket takes."""


def spec(folder: Path) -> msg.WorkerSpec:
    checkpoint = described_checkpoint(folder, num_layers=2, q_heads=2, kv_heads=1)
    return msg.WorkerSpec(
        rank=7,
        epoch=0,
        engine=EngineConfig(),
        video=VideoConfig(),
        checkpoint=checkpoint,
        dtype="float32",
        device="cpu",
        threads=1,
        init_method="",
        runtime_dir=str(folder),
    )


async def test_a_rank_that_does_not_read_blocks_nobody_and_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_server, "MODULE", "tests.support.deaf_program")
    ended = asyncio.Event()
    server = ForkServer()
    worker = WorkerProcess(
        spec(tmp_path),
        server,
        on_message=lambda message: None,
        on_exit=lambda rank, cause: ended.set(),
    )
    worker.start()
    async with asyncio.timeout(120):
        while not worker.pid:
            await asyncio.sleep(0.01)
    os.kill(worker.pid, signal.SIGSTOP)
    rescue = threading.Timer(60, worker.kill)  # of a test that would hang
    rescue.start()
    worker.send(msg.DropPrefix("x" * BYTES))
    worker.send(msg.Shutdown())
    assert rescue.is_alive()  # it has not been needed
    rescue.cancel()
    worker.kill()
    async with asyncio.timeout(60):
        await ended.wait()
    worker.send(msg.Shutdown())  # as to any rank that has just died
    async with asyncio.timeout(60):
        while any(thread.name.startswith("rank7-") for thread in threading.enumerate()):
            await asyncio.sleep(0.01)
    server.close()
