"""What a decoder process gives up before it looks at an untrusted file.

It does so itself, because ``preexec_fn`` is not safe in a parent with threads. The request's
resource limits come before anything of the file is read. The file system and then the system calls
(``seccomp``) are given up last, when the libraries have been loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PR_SET_NO_NEW_PRIVS = 38
_STDERR_BYTES = 64 << 10

_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_READ_FILE = 1 << 2
_LANDLOCK_READ_DIR = 1 << 3
_LANDLOCK_FS_V1 = (1 << 13) - 1
_LANDLOCK_NET = 0b11  # bind and connect, ABI 4


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


def landlock_abi() -> int:
    """The Landlock version of this kernel; 0 if it has none or does not allow it."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    abi = int(syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION))
    return max(abi, 0)


def confine_files(fd: int, libraries: Iterable[Path]) -> bool:
    """Deny all files but the one open as ``fd`` and those below ``libraries``, and TCP.

    Returns:
        Whether the kernel enforces it. Where it has no Landlock, the format and protocol
        whitelists are what keeps FFmpeg from other files.
    """
    abi = landlock_abi()
    if abi < 1:
        return False
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    handled = struct.pack("<QQ", _LANDLOCK_FS_V1, _LANDLOCK_NET)
    ruleset = syscall(_LANDLOCK_CREATE_RULESET, handled, 16 if abi >= 4 else 8, 0)
    if ruleset < 0:
        return False
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ruleset)
        allowed = {fd: _LANDLOCK_READ_FILE}
        for folder in libraries:
            opened = os.open(folder, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, opened)
            allowed[opened] = _LANDLOCK_READ_FILE | _LANDLOCK_READ_DIR
        for target, access in allowed.items():
            rule = struct.pack("<Qi", access, target)
            if syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0):
                return False
        return bool(syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0)
