"""Ends a process with its parent, however the parent ends, so that nothing lingers.

It imports nothing but the standard library: the processes that call it do so first of all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int | None = None) -> None:
    """Ask the kernel for SIGKILL when the parent's thread that started this process ends.

    Linux only; elsewhere it does nothing.

    Args:
        parent_pid: the expected parent. The process exits with 1 at once if that one ended
            before the call.

    Raises:
        OSError: the kernel refuses.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)
