"""The folders of services that run, that were killed, and that are none of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefill_service.errors import Reason, ServiceError
from prefill_service.generation.group_memory import list_memory
from prefill_service.runtime_folder import PREFIX, RuntimeFolder
from tests.support.leftovers import short_folder

HOLD = """
import sys, tempfile
from prefill_service.runtime_folder import RuntimeFolder
tempfile.tempdir = sys.argv[1]
folder = RuntimeFolder.create()
(folder.path / "reports.sock").touch()
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with short_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


def test_the_next_start_removes_what_no_living_process_owns(parent: Path) -> None:
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    killed, living = (Path(h.stdout.readline().strip()) for h in holders if h.stdout)
    holders[0].kill()
    holders[0].wait()
    assert (killed / "reports.sock").exists()
    ours = RuntimeFolder.create()
    assert sorted(parent.iterdir()) == sorted([living, ours.path])
    assert (living / "reports.sock").exists()
    holders[1].communicate("")  # ends without having removed its folder
    ours.remove()
    assert list(parent.iterdir()) == [living]
    again = RuntimeFolder.create()
    assert list(parent.iterdir()) == [again.path]
    again.remove()
    assert list(parent.iterdir()) == []


def test_shared_memory_of_a_group_that_was_killed_at_once_is_removed(parent: Path) -> None:
    """Its resource tracker did not live to do it."""
    code = (
        "from multiprocessing.shared_memory import SharedMemory\n"
        "memory = SharedMemory(create=True, size=1 << 20)\n"
        "print(memory.name, flush=True)\n"
        "input()"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert service.stdout
    assert other.stdout
    folder = Path(service.stdout.readline().strip()) / "vllm-1"
    folder.mkdir()
    memory = Path("/dev/shm") / other.stdout.readline().strip()
    list_memory(other.pid, folder)
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    RuntimeFolder.create().remove()
    assert memory.exists(), "a service that runs removes its vLLM's memory itself"
    service.kill()
    service.wait()
    RuntimeFolder.create().remove()
    assert not memory.exists()
    assert list(parent.iterdir()) == []


def test_a_temporary_folder_that_cannot_be_written_to_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(ServiceError, match="the temporary folder /proc cannot be used") as caught:
        RuntimeFolder.create()
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_what_is_not_ours_stays(parent: Path) -> None:
    """Folders of releases without locks, files, and links out of the folder."""
    (parent / "prefill-abc12345").mkdir()
    (parent / "kept").mkdir()
    (parent / f"{PREFIX}link").symlink_to(parent / "kept")
    (parent / f"{PREFIX}file").touch()
    before = sorted(parent.iterdir())
    RuntimeFolder.create().remove()
    assert sorted(parent.iterdir()) == before


def test_a_long_temporary_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets would not fit into it."""
    long = tmp_path / ("x" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = RuntimeFolder.create()
    try:
        assert folder.path.parent == Path("/tmp")
        assert (
            len(str(folder.path / "vllm-12345678" / "01234567-0123-0123-0123-0123456789ab")) < 108
        )
    finally:
        folder.remove()
