"""The parts of the chaos benchmark and the soak: disturbances, comparison, slopes, leftovers."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prefill_client import PrefillError

from benchmarks import soak
from benchmarks.chaos import census, findings
from benchmarks.chaos.clients import Outcome
from benchmarks.chaos.clock import Clock
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.known_answers import Comparison, make_cases
from benchmarks.chaos.network import Proxy
from benchmarks.chaos.sandbox import Sandbox
from benchmarks.chaos.trend import trend
from benchmarks.load.traffic import Film
from tools.needle.stories import Question

FILM = Film(Path("a.mp4"), 16, [Question("color", "What?", "red"), Question("color", "And?", "b")])


# ---- comparison ----------------------------------------------------------------------------


def answer(*token_ids: int) -> Any:
    return type("Answer", (), {"token_ids": token_ids, "job_id": "job_1"})


def test_every_film_is_asked_about_in_every_way() -> None:
    cases = make_cases([FILM, FILM], questions=2)
    assert {case.film for case in cases} == {0, 1}
    assert {case.kind for case in cases} == {"exact", "sparse", "chat", "long"}
    assert len({repr(case) for case in cases}) == len(cases)
    assert all(case.options["quality"] == "exact" for case in cases if case.kind != "sparse")


def test_an_answer_that_differs_by_a_token_is_a_mismatch() -> None:
    comparison = Comparison(make_cases([FILM], questions=1))
    comparison.expected = [(1, 2)] * len(comparison.cases)
    assert comparison.compare(0, answer(1, 2))
    assert not comparison.compare(0, answer(1, 3))
    assert not comparison.compare(0, answer(1))
    assert comparison.compared == {"exact": 3}
    assert [found["found"] for found in comparison.mismatches] == [[1, 3], [1]]


# ---- slopes --------------------------------------------------------------------------------


def test_a_slope_is_found_in_noise_and_noise_is_no_slope() -> None:
    rng = random.Random(1)
    seconds = [20.0 * i for i in range(360)]
    noise = [rng.gauss(500, 5) for _ in seconds]
    flat = trend(seconds, noise)
    assert flat is not None
    assert flat.flat
    assert abs(flat.per_hour) < 2
    growing = trend(
        seconds, [value + 10 * at / 3600 for at, value in zip(seconds, noise, strict=True)]
    )
    assert growing is not None
    assert growing.low < 10 < growing.high
    assert not growing.flat
    # One burst does not make a slope: windows count by their median.
    burst = [value + (1000 if i == 200 else 0) for i, value in enumerate(noise)]
    assert trend(seconds, burst) is not None
    assert abs(trend(seconds, burst).per_hour - flat.per_hour) < 0.5  # type: ignore[union-attr]


def test_too_few_samples_have_no_slope() -> None:
    assert trend([], []) is None
    assert trend([0.0, 1.0], [1.0, 2.0]) is None


def test_only_growth_that_is_certain_and_large_fails_a_soak() -> None:
    def samples(per_hour: float) -> list[dict[str, Any]]:
        found = []
        for i in range(120):
            size = int((500 + per_hour * i / 120) * 2**20)
            memory = {"rss": size, "pss": size, "private": size, "descriptors": 9, "threads": 3}
            kinds = {kind: {**memory, "processes": 1} for kind in census.KINDS}
            found.append({"at_s": 30.0 * i, **kinds})
        return found

    steady = soak.rows_of(samples(0.0), 0.0)
    assert len(steady) == len(census.KINDS) * len(soak.MEASURES)
    assert soak.growing(steady) == []
    assert len(soak.growing(soak.rows_of(samples(50.0), 0.0))) == len(census.KINDS)
    assert "rank" in soak.table(steady)


# ---- disturbances --------------------------------------------------------------------------


@asynccontextmanager
async def echo_through(proxy: Proxy) -> AsyncIterator[Proxy]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(100):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with proxy:
        host, port = server.sockets[0].getsockname()
        proxy.target = f"{host}:{port}"
        yield proxy
    server.close()


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_the_proxy_stalls_swallows_and_resets() -> None:
    async with asyncio.timeout(30), echo_through(Proxy()) as proxy:
        reader, writer = await connect(proxy)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        proxy.stall()
        writer.write(b"two")
        late = asyncio.create_task(reader.readexactly(3))
        done, _ = await asyncio.wait({late}, timeout=0.05)
        assert not done
        proxy.resume()
        assert await late == b"two"
        proxy.swallow()
        writer.write(b"three")
        await asyncio.sleep(0.05)
        proxy.resume()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(5)
        reader, writer = await connect(proxy)
        writer.write(b"four")
        assert await reader.readexactly(4) == b"four"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        proxy.target = ""
        reader, writer = await connect(proxy)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""


def test_the_clock_of_others_is_shifted_and_no_other(tmp_path: Path) -> None:
    clock = Clock()
    clock.build(tmp_path)
    if not clock.environment:
        pytest.skip("no C compiler here")
    script = "import time\nwhile input(): print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **clock.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for shift in (0, 3600, -86_400):
            clock.shift(shift)
            process.stdin.write("now\n")
            process.stdin.flush()
            told, monotonic = map(float, process.stdout.readline().split())
            assert abs(told - time.time() - shift) < 60
            assert abs(monotonic - time.monotonic()) < 60
        process.stdin.close()
        process.kill()


def test_the_sandbox_has_a_disk_to_fill_and_counts_what_is_left() -> None:
    with Sandbox() as sandbox:
        if not sandbox.bounded:
            pytest.skip("no unprivileged mount namespaces here")
        script = (
            "import os, pathlib, sys, tempfile\n"
            "path = pathlib.Path(tempfile.mkdtemp(dir=sys.argv[1]), 'row')\n"
            "path.write_bytes(b'12345')\n"
            "pathlib.Path('/dev/shm/psm_left').write_bytes(b'1')\n"
            "open(tempfile.gettempdir() + '/file_left', 'w').close()\n"
        )

        def run_inside(text: str) -> subprocess.CompletedProcess[str]:
            command = [*sandbox.launcher, sys.executable, "-c", text, str(sandbox.data)]
            return subprocess.run(
                command, env=sandbox.environment(), capture_output=True, text=True, check=False
            )

        assert not any(sandbox.leftovers().values())
        assert run_inside(script).returncode == 0
        found = sandbox.leftovers()
        assert found["shared memory"] == ["psm_left"]
        assert found["temporary files"] == ["file_left"]
        assert not Path("/dev/shm/psm_left").exists()
        sandbox.fill_disk()
        full = run_inside(script)
        assert "No space left on device" in full.stderr
        sandbox.free_disk()
        assert run_inside(script).returncode == 0
        folder = sandbox.folder
    assert not folder.exists()


def test_a_process_that_nobody_ends_is_left_over() -> None:
    with Sandbox() as sandbox:
        orphan = "import subprocess, sys; subprocess.Popen(['sleep', '600'], stdout=2)"
        subprocess.run([sys.executable, "-c", orphan], check=True)
        (left,) = [name for name in sandbox.leftovers()["processes"] if "sleep" in name]
        assert left == "sleep 600"
        for child in census.psutil.Process().children():
            if child.name() == "sleep":
                child.kill()
                child.wait()


# ---- findings ------------------------------------------------------------------------------


def test_what_must_not_be_is_found() -> None:
    comparison = Comparison(make_cases([FILM], questions=1))
    comparison.expected = [(1,)] * len(comparison.cases)
    outcome = Outcome()
    found = findings.Findings(comparison, outcome)
    found.recoveries["rank-killed"] += [1.0, 3.0]
    outcome.disturbance = "disk-full"
    outcome.add_failure("upload", PrefillError("STORAGE_FULL", "no room"))
    found.leftovers = {"processes": [], "sockets": []}
    assert found.faults_found() == []
    (row,) = found.rows()
    assert (row["times"], row["median_s"], row["max_s"], row["target_s"]) == (2, 2.0, 3.0, 15.0)
    outcome.add_failure("ask", PrefillError("INTERNAL", "oops"))
    comparison.compare(0, answer(2))
    found.recoveries["rank-killed"].append(None)
    found.leftovers["sockets"].append("a.sock")
    assert len(found.faults_found()) == 4
    assert "rank-killed" in findings.table(found.rows())
    content = found.content({"seconds": 1})
    assert content["failures"][0]["reason"] == "STORAGE_FULL"


def test_faults_have_names_of_their_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_processes_are_counted_by_kind() -> None:
    found = census.memory_by_kind(os.getpid())
    own = found[census.FRONT_END]
    assert own["processes"] == 1
    assert own["pids"] == [os.getpid()]
    assert own["rss"] >= own["pss"] > own["private"] > 1 << 20
    assert own["descriptors"] > 2
