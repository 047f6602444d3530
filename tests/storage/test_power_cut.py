"""What a client was answered holds after a power cut at any moment."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import pytest

from prefill_service.config import StorageConfig, VideoConfig
from prefill_service.errors import Reason, ServiceError
from prefill_service.scheduling.job import JobState
from prefill_service.scheduling.job_store import JobStore
from prefill_service.video.index import VideoIndex
from prefill_service.video.records import VideoState
from prefill_service.video.store import VideoStore
from tests.storage.durable_work import EVENTS
from tests.storage.power_cut import Operation, SimulatedDisk, read_log

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
CUTS = 40
UNREADABLE = (OSError, EOFError, ValueError, KeyError, BadZipFile)
"""What numpy raises for indexes of which parts are missing."""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the recorder of writes is in C, for Linux; there is no compiler here")
    library = tmp_path_factory.mktemp("recorder") / "write_log.so"
    source = Path(__file__).with_name("write_log.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


Record = Callable[..., list[Operation]]


@pytest.fixture
def record(recorder: Path, tmp_path: Path, video: bytes) -> Record:
    """``record(seed, **environment)``: the log of a process that does ``durable_work``."""

    def run(seed: int, **environment: str) -> list[Operation]:
        folder = tmp_path / f"work{seed}"
        folder.mkdir()
        (tmp_path / "v.mp4").write_bytes(video)
        log = tmp_path / f"log{seed}"
        command = [sys.executable, "-m", "tests.storage.durable_work"]
        command += [str(folder), str(tmp_path / "v.mp4"), str(seed), str(STEPS)]
        recording = {
            "LD_PRELOAD": str(recorder),
            "WRITE_LOG": str(log),
            "WRITE_LOG_ROOT": str(folder),
        }
        done = subprocess.run(
            command,
            env={**os.environ, **recording, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return list(read_log(log, folder))

    return run


def cut(operations: list[Operation], folder: Path, chance: random.Random) -> list[dict[str, str]]:
    """Replay some of the operations; returns the answers to clients until then."""
    disk = SimulatedDisk()
    answered = []
    for operation in operations:
        if operation.path != EVENTS:
            disk.apply(operation)
        elif operation.kind == "W":
            answered.append(json.loads(operation.data))
    disk.write_after_cut(folder, chance)
    return answered


async def check_promises(folder: Path, answered: list[dict[str, str]]) -> None:
    """Start on what the cut left, and find all that clients were answered."""
    data_dir = folder / "data"
    videos = VideoStore.open(StorageConfig(data_dir=str(data_dir)), VideoConfig())
    jobs = JobStore.open(data_dir / "jobs.db")
    deleting = {event["name"] for event in answered if event["event"] == "deleting"}
    cancelled = {event["name"] for event in answered if event["event"] == "cancelled"}
    for event in answered:
        name = event["name"]
        match event["event"]:
            case "created" if name not in deleting:
                assert (await videos.get_video(name)).state is not VideoState.FAILED
            case "ready" if name not in deleting:
                async with videos.hold_video(name) as held:
                    data = held.path.read_bytes()
                    assert hashlib.sha256(data).hexdigest() == event["sha256"]
                    assert VideoIndex.load(held.index_path).frame_count == 4
            case "deleted":
                with pytest.raises(ServiceError) as caught:
                    await videos.get_video(name)
                assert caught.value.reason is Reason.UNKNOWN_VIDEO
                assert not (data_dir / "videos" / name).exists()
            case "job":
                found = jobs.get_record(name)
                assert found.state in (JobState.QUEUED, JobState.CANCELLED)
                assert jobs.find_request(event["request"], found.spec) == name
                if name in cancelled:
                    assert found.state is JobState.CANCELLED
    await videos.close()
    jobs.close()
    for path in (data_dir / "videos.db", data_dir / "jobs.db"):
        database = sqlite3.connect(path)
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_what_clients_were_answered_survives(record: Record, tmp_path: Path, seed: int) -> None:
    operations = record(seed)
    chance = random.Random(seed)
    events = sum(operation.path == EVENTS for operation in operations)
    assert events > STEPS // 2, "the work has hardly done anything"
    for number in range(CUTS):
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        count = chance.randint(1, len(operations))
        answered = cut(operations[:count], folder, chance)
        try:
            asyncio.run(check_promises(folder, answered))
        except BaseException as error:
            error.add_note(f"cut {number} of seed {seed}, after {count} operations: {folder}")
            raise
        shutil.rmtree(folder)


def test_a_sync_that_is_left_out_is_noticed(record: Record, tmp_path: Path) -> None:
    """The same check fails on the same work without the syncs of one kind of file."""
    operations = record(3)
    for name in ("input.bin", "index.3.npz", "videos.db-wal", "jobs.db-wal", "data/videos"):
        lying = [op for op in operations if not (op.kind == "S" and op.path.endswith(name))]
        assert len(lying) < len(operations), name
        assert any(_loses(lying, tmp_path, seed) for seed in range(20)), f"{name} need no sync"


def _loses(operations: list[Operation], tmp_path: Path, seed: int) -> bool:
    folder = tmp_path / "lying"
    folder.mkdir()
    chance = random.Random(seed)
    count = chance.randint(len(operations) // 2, len(operations))
    answered = cut(operations[:count], folder, chance)
    try:
        asyncio.run(check_promises(folder, answered))
    except (AssertionError, ServiceError, sqlite3.Error, *UNREADABLE):
        return True
    finally:
        shutil.rmtree(folder)
    return False
