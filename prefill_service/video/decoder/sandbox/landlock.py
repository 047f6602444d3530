"""The files that are left to a decoder process (Landlock, Linux 5.13 and newer)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1
_LANDLOCK_READ_FILE = 1 << 2
_LANDLOCK_READ_DIR = 1 << 3
_LANDLOCK_FS_V1 = (1 << 13) - 1
_LANDLOCK_NET = 0b11  # bind and connect, ABI 4


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
