"""What the system says of processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children() -> set[int]:
    """Decoder children of this process."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        for pid in (thread / "children").read_text().split():
            command = Path(f"/proc/{pid}/cmdline")
            if command.exists() and b"video.decoder.child" in command.read_bytes():
                found.add(int(pid))
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False
