"""Life and death of the embedded vLLM, and of the service around it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import aiohttp
import psutil
import pytest

from prefill_service.config import VllmConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.server import GenerationServer
from prefill_service.generation.vllm_client import GenerationRequest, Sampling
from prefill_service.kv.handoff import HandoffParams
from prefill_service.kv.manifest import KVLayout, hash_token_ids
from tests.generation.oracle import Case, compute
from tests.kv.rank_process import deal, make_manifest, publish, rank_processes
from tests.support.leftovers import shared_memory_of, short_folder, still_there

LAYOUT = KVLayout(num_layers=4, kv_heads=2, head_dim=64, dtype="float32", page_tokens=64)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


async def ask(
    vllm: GenerationServer, case: Case, handoff: HandoffParams, name: str, *, tokens: int
) -> list[int]:
    prefix_id = handoff.manifest.prefix_id
    request = GenerationRequest(
        token_ids=case.prompts[0],
        plan=replace(case.plan, prefix_id=prefix_id),
        handoff=handoff,
        sampling=Sampling(max_tokens=tokens, ignore_eos=True),
        request_id=name,
    )
    return [t async for event in vllm.generate(request) for t in event.token_ids]


async def test_preemption_death_and_restart(
    checkpoint: Callable[..., Path], tmp_path: Path, runtime_dir: Path
) -> None:
    # Room for 12 blocks of 128 tokens: two answers of 700 tokens cannot both stay.
    size = 12.5 * 128 * LAYOUT.token_bytes / (1 << 30)
    config = VllmConfig(max_model_len=1024, kv_cache_gib=size)
    model = checkpoint("qwen3_vl")
    vllm = GenerationServer(config, str(model), "float32", tmp_path, runtime_dir=runtime_dir)
    starting = asyncio.create_task(vllm.start())
    case = await asyncio.to_thread(compute, model, 16, 128, 160, new_tokens=16)
    await starting
    try:
        with rank_processes(LAYOUT, 2, tmp_path) as ranks:
            handoffs = []
            for name in ("a", "b"):
                manifest = make_manifest(
                    LAYOUT,
                    deal(case.plan.num_tokens, 2, 100, LAYOUT),
                    [rank.endpoint for rank in ranks],
                    prefix_id=name,
                    token_ids_hash=hash_token_ids(case.plan.token_ids),
                    position_delta=case.plan.position_delta,
                    model_fingerprint=case.fingerprint,
                )
                publish(manifest, ranks, case.kv, "lease")
                for rank in ranks:
                    rank.store("grant_lease", name, "lease", 600)
                handoffs.append(HandoffParams(manifest, "lease", ""))

            alone = await ask(vllm, case, handoffs[0], "alone", tokens=700)
            assert alone[: len(case.answers[0])] == case.answers[0]
            for turn in range(6):  # one may be through before the other needs its room
                together = await asyncio.gather(
                    *(ask(vllm, case, h, f"{turn}-{i}", tokens=700) for i, h in enumerate(handoffs))
                )
                assert together == [alone, alone]
                if await _preemptions(vllm) > 0:
                    break
            assert await _preemptions(vllm) > 0, "the test shows nothing"

            await _kill_engine_and_see(vllm, case, handoffs[0])
            assert await ask(vllm, case, handoffs[0], "after", tokens=16) == case.answers[0]
    finally:
        processes = psutil.Process(vllm.pid).children(recursive=True)
        memory = shared_memory_of(processes)
        assert memory
        assert list(runtime_dir.rglob("*")), "vLLM's sockets are elsewhere"
        await vllm.stop()
    # At once: a stop returns when everything is gone.
    assert not still_there(memory, timeout_s=0)
    assert list(runtime_dir.iterdir()) == []
    _, alive = psutil.wait_procs(processes, 5)
    assert not alive


async def _preemptions(vllm: GenerationServer) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{vllm.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:num_preemptions_total"))


async def _kill_engine_and_see(vllm: GenerationServer, case: Case, handoff: HandoffParams) -> None:
    """The engine dies under an answer: a precise error, then a restart by itself."""
    children = psutil.Process(vllm.pid).children(recursive=True)
    memory = shared_memory_of(children)
    old_pid = vllm.pid
    (engine,) = [p for p in children if "EngineCore" in p.name() or "EngineCor" in p.name()]
    # It stands still first: it could be through with its answer before anybody can kill it.
    assert vllm._client is not None
    client = vllm._client
    await client.check_engine(60.0)
    engine.suspend()
    with pytest.raises(ServiceError, match="has not made a token within 1 s"):
        await client.check_engine(1.0)
    await client.check_health()  # which does not notice
    asking = asyncio.create_task(ask(vllm, case, handoff, "dying", tokens=700))
    await asyncio.sleep(1)
    engine.kill()
    with pytest.raises(ServiceError) as caught:
        await asking
    assert caught.value.reason == Reason.DECODER_UNAVAILABLE
    deadline = time.monotonic() + 60
    while vllm.ready:
        assert time.monotonic() < deadline, "the death was not noticed"
        await asyncio.sleep(0.1)
    with pytest.raises(ServiceError, match="vLLM is not ready") as caught:
        await ask(vllm, case, handoff, "too-soon", tokens=4)
    assert caught.value.reason == Reason.DECODER_UNAVAILABLE
    deadline = time.monotonic() + 240
    while not vllm.ready:
        assert time.monotonic() < deadline, vllm.trouble
        await asyncio.sleep(0.5)
    assert vllm.pid != old_pid
    assert not still_there(memory, timeout_s=0)
    _, alive = psutil.wait_procs(children, 5)
    assert not alive


_SERVICE = """
import asyncio, sys
from pathlib import Path
from prefill_service.config import VllmConfig
from prefill_service.generation.server import GenerationServer
server = GenerationServer(VllmConfig(), sys.argv[1], "float32", Path(sys.argv[2]))
asyncio.run(server.start())
"""


def test_vllm_dies_with_a_killed_service(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = str(checkpoint("qwen3_vl"))
    service = subprocess.Popen([sys.executable, "-c", _SERVICE, model, str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        family: list[psutil.Process] = []
        memory: set[Path] = set()
        # The API server, EngineCore and at least one more (worker or resource tracker).
        while len(family) < 3:
            assert time.monotonic() < deadline
            assert service.poll() is None
            time.sleep(0.5)
            family = psutil.Process(service.pid).children(recursive=True)
            memory |= shared_memory_of(family)
        while not memory:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            family = psutil.Process(service.pid).children(recursive=True)
            memory |= shared_memory_of(family)
    finally:
        os.kill(service.pid, signal.SIGKILL)
        service.wait()
    _, alive = psutil.wait_procs(family, 10)
    assert not alive
    assert not still_there(memory)


async def test_vllm_that_cannot_start_is_explained(tmp_path: Path) -> None:
    config = VllmConfig(extra_args=["--no-such-flag"])
    vllm = GenerationServer(config, str(tmp_path), "float32", tmp_path)
    with pytest.raises(ServiceError) as caught:
        await vllm.start()
    assert caught.value.reason == Reason.DECODER_UNAVAILABLE
    assert "--no-such-flag" in caught.value.message
    assert vllm.pid is None
    assert not vllm.ready


async def test_url_where_nobody_listens(tmp_path: Path) -> None:
    vllm = GenerationServer(VllmConfig(url="http://127.0.0.1:9"), "", "float32", tmp_path)
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:9") as caught:
        await vllm.start()
    assert caught.value.reason == Reason.DECODER_UNAVAILABLE
