"""A process that asked to die with its parent does, also when the parent is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")

_CHILD = """
from prefill_service.parent_death import die_with_parent
import os, signal
die_with_parent(int(os.environ["PARENT"]))
print("ready", flush=True)
signal.pause()
"""
_PARENT = f"""
import os, signal, subprocess, sys
env = os.environ | {{"PARENT": str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {_CHILD!r}], env=env)
signal.pause()
"""


def test_dies_with_its_parent() -> None:
    # Both hold the pipe's writing end: it closes when the last of them has ended.
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert parent.stdout.read() == ""


def test_exits_at_once_under_another_parent() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD], env=os.environ | {"PARENT": "1"}, check=False
    )
    assert child.returncode == 1
