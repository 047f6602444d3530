"""The process that workers are forked from: what it passes on, what it and they die of."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from prefill_service.engine.processes import fork_server
from prefill_service.engine.processes.fork_server import ForkedProcess, ForkServer
from prefill_service.errors import Reason, ServiceError
from tests.support.engine_state import worker_pids
from tests.support.standalone_executor import StandaloneExecutor, standalone_executor

module_loop = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServer]:
    monkeypatch.setattr(fork_server, "MODULE", "tests.support.forked_program")
    server = ForkServer()
    yield server
    server.close()


def fork(server: ForkServer, folder: Path) -> tuple[socket.socket, ForkedProcess]:
    """A child whose temporary folder is ``folder``, and the other end of its socket pair."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    with theirs:
        return ours, server.fork(theirs.fileno(), {**os.environ, "TMPDIR": str(folder)})


def test_children_have_their_own_environment_and_exit_code(
    server: ForkServer, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    children = [fork(server, folder) for folder in folders]
    parents = set()
    for folder, (pipe, _) in zip(folders, children, strict=True):
        said, parent, pid = pipe.recv(1000).decode().split()
        assert said == str(folder)
        assert psutil.pid_exists(int(pid))
        parents.add(parent)
    assert len(parents) == 1
    for code, (pipe, process) in enumerate(children, start=3):
        assert process.poll() is None
        pipe.send(bytes([code]))
        assert process.wait() == code
        with pipe:
            assert pipe.recv(1) == b""  # no other child holds this end


def test_a_child_that_is_killed_at_once_is_killed_when_it_is_there(
    server: ForkServer, tmp_path: Path
) -> None:
    pipe, process = fork(server, tmp_path)
    with pipe:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.kill()  # nobody


def test_children_die_with_the_server_and_another_one_starts(
    server: ForkServer, tmp_path: Path
) -> None:
    pipe, process = fork(server, tmp_path)
    parent, child = map(int, pipe.recv(1000).split()[1:])
    dying = psutil.Process(child)
    os.kill(parent, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    psutil.wait_procs([dying], timeout=60)
    assert not dying.is_running()
    with pipe:
        assert pipe.recv(1) == b""
    after, process = fork(server, tmp_path)
    with after:
        assert int(after.recv(1000).split()[1]) != parent
        after.send(b"\0")
        assert process.wait() == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[StandaloneExecutor]:
    folder = tmp_path_factory.mktemp("pair")
    async with standalone_executor(
        checkpoint("qwen3_vl"), folder, 2, fork_server=ForkServer()
    ) as standalone:
        yield standalone


def server_of(standalone: StandaloneExecutor) -> psutil.Process:
    (server,) = {psutil.Process(pid).parent() for pid in worker_pids(standalone.supervisor)}
    assert server is not None
    return server


async def restarted(standalone: StandaloneExecutor) -> None:
    epoch = standalone.supervisor.epoch
    async with asyncio.timeout(60):
        while standalone.supervisor.epoch == epoch:
            await asyncio.sleep(0.01)
    await standalone.supervisor.wait_ready()


@module_loop
async def test_ranks_share_the_memory_of_what_is_imported(pair: StandaloneExecutor) -> None:
    for pid in worker_pids(pair.supervisor):
        memory = psutil.Process(pid).memory_full_info()
        assert memory.pss < 0.7 * memory.rss


@module_loop
async def test_a_rank_that_was_killed_is_forked_again(pair: StandaloneExecutor) -> None:
    before = server_of(pair)
    os.kill(worker_pids(pair.supervisor)[1], signal.SIGKILL)
    await restarted(pair)
    assert server_of(pair) == before


@module_loop
async def test_the_death_of_the_server_is_that_of_the_ranks(pair: StandaloneExecutor) -> None:
    lost: list[ServiceError] = []
    pair.supervisor.add_loss_listener(lambda epoch, error: lost.append(error))
    before = server_of(pair)
    workers = [psutil.Process(pid) for pid in worker_pids(pair.supervisor)]
    before.kill()
    await restarted(pair)
    (error,) = lost
    assert error.reason is Reason.RANK_DIED
    assert "was killed by SIGKILL" in error.message
    assert not any(worker.is_running() for worker in workers)
    assert server_of(pair) != before
