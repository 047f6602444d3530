"""Ten minutes in which everything is disturbed and every answer is compared.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --seconds 60 --faults rank-killed decoders-killed

Clients with the SDK ask questions whose answers are known, while ranks, vLLM, decoders, clients,
the front end, the disk, the network and the clock are disturbed, one after the other, in an order
that the seed decides. After each fault a question that takes every part is asked until it is
answered: the time to that is the recovery. At the end the service is stopped, and what it has left
behind is counted. The exit status is 1 if an answer differs, a call fails for a reason that says
nothing, a fault is not recovered from, or something is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import torch
from prefill_client.aio import AsyncClient

from benchmarks import tables
from benchmarks.chaos.census import memory_by_kind
from benchmarks.chaos.clients import Outcome, Prober, SteadyClient, Story
from benchmarks.chaos.clock import Clock
from benchmarks.chaos.faults import BY_NAME, FAULTS, Fault, Scene
from benchmarks.chaos.findings import UNDISTURBED, Findings, table
from benchmarks.chaos.known_answers import Comparison, make_cases
from benchmarks.chaos.network import Proxy
from benchmarks.chaos.running_service import RunningService
from benchmarks.chaos.sandbox import Sandbox
from benchmarks.load.traffic import make_films
from benchmarks.processes import end_on_sigterm

ROOT = Path(__file__).resolve().parents[2]
PATCHES = (16, 24, 32)
SIDE = 192
QUESTIONS = 2
UNDISTURBED_PROBES = 3
RECOVERY_LIMIT_S = 600.0
CALM_S = (1.0, 4.0)
"""Between a recovery and the next fault."""

ARGUMENTS = (
    "--ranks",
    "2",
    "--device",
    "cpu",
    "--engine-threads-per-rank",
    "1",
    "--engine-kv-pool-bytes",
    str(24 << 20),
    "--vllm-kv-cache-gib",
    "0.25",
    "--vllm-stall-timeout-s",
    "20",
    "--storage-min-free-bytes",
    str(1 << 20),
    "--server-drain-seconds",
    "5",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if something was found that must not be."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # this process asks; it computes nothing
    settings = tables.settings(
        seconds=options.seconds,
        seed=options.seed,
        clients=options.clients,
        patches=PATCHES,
        arguments=ARGUMENTS,
    )
    with Sandbox() as sandbox:
        logs = options.logs or sandbox.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(_chaos(options, sandbox, logs))
    content = found.content(settings)
    tables.write(options.out, content)
    print(f"\n{table(content['rows'])}\n")
    print(f"{sum(content['compared'].values())} answers compared, ", end="")
    print(f"{len(content['mismatches'])} differ; leftovers: {content['leftovers']}")
    for sentence in content["faults_found"]:
        print(f"FOUND {sentence}")
    return 1 if content["faults_found"] else 0


async def _chaos(options: argparse.Namespace, sandbox: Sandbox, logs: Path) -> Findings:
    """The service's life from its start to the count of what it has left."""
    films = make_films(PATCHES[: options.films], sandbox.films, options.seed, SIDE)
    clock = Clock()
    clock.build(sandbox.folder)
    service = RunningService(["--model", str(options.checkpoint), *ARGUMENTS], sandbox, clock, logs)
    comparison = Comparison(make_cases(films, QUESTIONS))
    found = Findings(comparison, Outcome())
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(Proxy())
        stack.push_async_callback(service.stop)
        await service.start()
        proxy.target = service.address
        async with AsyncClient(service.address) as client:
            videos = [await client.upload(film.path) for film in films]
            await comparison.learn(client, videos)
        print(f"{len(comparison.cases)} answers known", flush=True)
        scene = Scene(
            service=service,
            sandbox=sandbox,
            proxy=proxy,
            clock=clock,
            rng=random.Random(options.seed),
            video_id=videos[0].video_id,
        )
        await _disturb(options, scene, Story(films, videos, comparison), found)
    found.leftovers = sandbox.leftovers()
    if service.unclean:
        found.leftovers["processes that had to be killed"] = service.unclean
    return found


async def _disturb(
    options: argparse.Namespace, scene: Scene, story: Story, found: Findings
) -> None:
    """Faults one after the other while clients ask."""
    service = scene.service
    outcome = found.outcome
    prober = Prober(story, outcome, options.seed)
    outcome.disturbance = UNDISTURBED
    for _ in range(UNDISTURBED_PROBES):
        begin = time.monotonic()
        await prober.wait_answer(scene.proxy.address, RECOVERY_LIMIT_S)
        found.recoveries[UNDISTURBED].append(time.monotonic() - begin)
    found.memory.append(await asyncio.to_thread(memory_by_kind, service.pid))
    chosen = [BY_NAME[name] for name in options.faults]
    found.not_run = [fault.name for fault in chosen if not fault.possible(scene)]
    chosen = [fault for fault in chosen if fault.possible(scene)]
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(options.clients):
            client = SteadyClient(scene.proxy.address, story, outcome, options.seed + number)
            group.create_task(client.run(stop))
        try:
            end = time.monotonic() + options.seconds
            deck: list[Fault] = []
            while time.monotonic() < end:
                if not deck:
                    deck = scene.rng.sample(chosen, len(chosen))
                await _inflict(deck.pop(), scene, prober, found)
                await asyncio.sleep(scene.rng.uniform(*CALM_S))
        finally:
            stop.set()
    found.memory.append(await asyncio.to_thread(memory_by_kind, service.pid))


async def _inflict(fault: Fault, scene: Scene, prober: Prober, found: Findings) -> None:
    """One fault, and the wait until everything works again."""
    found.outcome.disturbance = fault.name
    found.loads.append(os.getloadavg()[0])
    begin = time.monotonic()
    await fault.inflict(scene)
    if not fault.from_begin:
        begin = time.monotonic()
    recovery = None
    try:
        address = scene.proxy.address if fault.by_proxy else scene.service.address
        await prober.wait_answer(address, RECOVERY_LIMIT_S)
        recovery = time.monotonic() - begin
    except TimeoutError:
        pass
    found.recoveries[fault.name].append(recovery)
    print(
        f"{fault.name}: {'not recovered' if recovery is None else f'{recovery:.1f} s'}", flush=True
    )
    try:
        scene.service.check()
    except RuntimeError as error:
        found.deaths.append(f"{fault.name}: {error}")
        await scene.service.restart()
        scene.proxy.target = scene.service.address


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [fault.name for fault in FAULTS]
    add("--seconds", type=float, default=600.0, help="of disturbance; %(default)s")
    add("--seed", type=int, default=1, help="of films, faults and clients; %(default)s")
    add("--faults", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names}")
    add("--clients", type=int, default=3, help="that ask all the time; %(default)s")
    add("--films", type=int, choices=(1, 2, 3), default=3, help="asked about; %(default)s")
    add("--checkpoint", type=Path, default=ROOT / "assets" / "needle-qwen3-vl")
    add("--logs", type=Path, help="folder for the services' logs, which stay there")
    add("--out", type=Path, default=tables.RESULTS / "chaos-cpu.json")
    return parser


if __name__ == "__main__":
    end_on_sigterm()
    sys.exit(main())
