"""What is done to the service: each fault, and how it ends."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.chaos import census
from benchmarks.chaos.clock import Clock
from benchmarks.chaos.network import Proxy
from benchmarks.chaos.running_service import RunningService
from benchmarks.chaos.sandbox import Sandbox

PAUSE_S = 4.0
"""How long what is not final lasts: a stopped process, a full disk, a silent network."""

CLOCK_S = 3600
FIND_S = 300.0


@dataclass(slots=True)
class Scene:
    """What the faults act on."""

    service: RunningService
    sandbox: Sandbox
    proxy: Proxy
    clock: Clock
    rng: random.Random
    video_id: str = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """A disturbance.

    Attributes:
        name: for tables and the command line.
        part: what is disturbed.
        inflict: does it, and undoes what does not stay; recovery counts from its end.
        target_s: recovery that is aimed at, on two cores that do nothing else; 0: none.
        possible: whether it can be inflicted here.
        by_proxy: whether recovery is seen through the proxy only.
        from_begin: whether recovery counts from the begin of ``inflict``.
    """

    name: str
    part: str
    inflict: Callable[[Scene], Awaitable[None]]
    target_s: float = 0.0
    possible: Callable[[Scene], bool] = lambda scene: True
    by_proxy: bool = False
    from_begin: bool = False


async def _find(scene: Scene, kind: str) -> list[int]:
    """Process ids of a kind; waits until there is one."""
    end = time.monotonic() + FIND_S
    while True:
        found = await asyncio.to_thread(census.processes_by_kind, scene.service.pid)
        if found[kind]:
            return found[kind]
        if time.monotonic() > end:
            raise RuntimeError(f"the service has had no {kind} for {FIND_S:g} s")


def _signal(kind: str, *, number: int = signal.SIGKILL) -> Callable[[Scene], Awaitable[None]]:
    """Sends a signal to one process of a kind."""

    async def inflict(scene: Scene) -> None:
        with suppress(ProcessLookupError):
            os.kill(scene.rng.choice(await _find(scene, kind)), number)

    return inflict


def _pause(kind: str) -> Callable[[Scene], Awaitable[None]]:
    """Stops one process of a kind for ``PAUSE_S``."""

    async def inflict(scene: Scene) -> None:
        pid = scene.rng.choice(await _find(scene, kind))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(PAUSE_S)
            os.kill(pid, signal.SIGCONT)

    return inflict


async def _kill_decoders(scene: Scene) -> None:
    for pid in await _find(scene, census.DECODER):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _kill_client(scene: Scene) -> None:
    """A client dies when it has got the first piece of its answer."""
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.chaos.leaving_client", scene.proxy.address, scene.video_id),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert client.stdout is not None
    try:
        await asyncio.wait_for(client.stdout.readline(), FIND_S)
    finally:
        with suppress(ProcessLookupError):
            client.kill()
        await client.wait()


async def _kill_front_end(scene: Scene) -> None:
    os.kill(scene.service.pid, signal.SIGKILL)
    scene.proxy.target = ""
    await scene.service.restart()
    scene.proxy.target = scene.service.address


async def _restart_front_end(scene: Scene) -> None:
    """As an upgrade does: SIGTERM, and a new one when the old one has ended."""
    await scene.service.stop()
    scene.proxy.target = ""
    await scene.service.restart()
    scene.proxy.target = scene.service.address


async def _fill_disk(scene: Scene) -> None:
    await asyncio.to_thread(scene.sandbox.fill_disk)
    try:
        await asyncio.sleep(PAUSE_S)
    finally:
        scene.sandbox.free_disk()


async def _reset_connections(scene: Scene) -> None:
    scene.proxy.reset()


async def _stall_network(scene: Scene) -> None:
    scene.proxy.stall()
    await asyncio.sleep(PAUSE_S)
    scene.proxy.resume()


async def _swallow_network(scene: Scene) -> None:
    scene.proxy.swallow()
    await asyncio.sleep(PAUSE_S)
    scene.proxy.resume()


def _shift_clock(seconds: int) -> Callable[[Scene], Awaitable[None]]:
    async def inflict(scene: Scene) -> None:
        scene.clock.shift(seconds)
        await asyncio.sleep(PAUSE_S)
        scene.clock.shift(0)

    return inflict


def _has_clock(scene: Scene) -> bool:
    return bool(scene.clock.environment)


def _has_disk(scene: Scene) -> bool:
    return scene.sandbox.bounded


_STOP = signal.SIGSTOP

FAULTS = (
    Fault("rank-killed", "a rank, kill -9", _signal(census.RANK), target_s=15.0),
    Fault("rank-stopped", "a rank, kill -STOP", _signal(census.RANK, number=_STOP)),
    Fault("rank-paused", f"a rank, stopped for {PAUSE_S:g} s", _pause(census.RANK)),
    Fault("engine-killed", "vLLM's engine, kill -9", _signal(census.ENGINE), target_s=30.0),
    Fault(
        "vllm-worker-killed", "vLLM's worker, kill -9", _signal(census.VLLM_WORKER), target_s=30.0
    ),
    Fault("vllm-killed", "vLLM's API server, kill -9", _signal(census.VLLM), target_s=30.0),
    Fault("engine-paused", f"vLLM's engine, stopped for {PAUSE_S:g} s", _pause(census.ENGINE)),
    Fault("engine-stopped", "vLLM's engine, kill -STOP", _signal(census.ENGINE, number=_STOP)),
    Fault("vllm-stopped", "vLLM's API server, kill -STOP", _signal(census.VLLM, number=_STOP)),
    Fault("decoders-killed", "all video decoders, kill -9", _kill_decoders, target_s=1.0),
    Fault("client-killed", "a client in mid-answer, kill -9", _kill_client),
    Fault(
        "front-end-killed",
        "the front end, kill -9, and a new one",
        _kill_front_end,
        from_begin=True,
    ),
    Fault(
        "front-end-restarted",
        "the front end, SIGTERM, and a new one",
        _restart_front_end,
        from_begin=True,
    ),
    Fault("disk-full", f"no byte free for {PAUSE_S:g} s", _fill_disk, possible=_has_disk),
    Fault("connections-reset", "all connections, reset", _reset_connections, by_proxy=True),
    Fault("network-stalled", f"no byte for {PAUSE_S:g} s", _stall_network, by_proxy=True),
    Fault("network-lossy", f"bytes lost for {PAUSE_S:g} s", _swallow_network, by_proxy=True),
    Fault("clock-forward", "the clock, an hour ahead", _shift_clock(CLOCK_S), possible=_has_clock),
    Fault("clock-back", "the clock, an hour back", _shift_clock(-CLOCK_S), possible=_has_clock),
)
BY_NAME = {fault.name: fault for fault in FAULTS}
