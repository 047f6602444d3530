"""Privileges, memory, CPU and files of a decoder process, bounded by the kernel."""

from __future__ import annotations

import ctypes
import resource
from dataclasses import dataclass

_PR_SET_NO_NEW_PRIVS = 38
_STDERR_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """Limits that the kernel enforces on a decoder process."""

    memory_bytes: int
    cpu_s: int


def forgo_privileges() -> None:
    """Gain none from here on, also by executing a program that would give some."""
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def confine_resources(limits: ResourceLimits) -> None:
    """Limit memory, CPU, files written and open files."""
    for kind, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_s),
        (resource.RLIMIT_FSIZE, _STDERR_BYTES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # The hard CPU limit lies above the soft one: SIGXCPU then tells why the process died.
        ceiling = value + 5 if kind == resource.RLIMIT_CPU and hard == -1 else value
        resource.setrlimit(kind, (value, ceiling))
