"""The system calls that are left to a decoder process (seccomp, x86-64).

A decoder reads a file, computes and writes to a pipe. What it does not need for that the kernel
refuses, whatever code a hostile file makes it run: sockets of any kind, other programs and
processes, other processes' memory, mounts, namespaces, tracing, and the corners of the kernel in
which holes are found (io_uring, bpf, keyrings, userfaultfd, perf events).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

_CALLS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "fstat": 5,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "pread64": 17,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "select": 23,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "dup": 32,
    "dup2": 33,
    "nanosleep": 35,
    "getpid": 39,
    "exit": 60,
    "uname": 63,
    "fcntl": 72,
    "getcwd": 79,
    "readlink": 89,
    "gettimeofday": 96,
    "getrlimit": 97,
    "getrusage": 98,
    "sysinfo": 99,
    "times": 100,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "getppid": 110,
    "sigaltstack": 131,
    "arch_prctl": 158,
    "gettid": 186,
    "futex": 202,
    "sched_getaffinity": 204,
    "getdents64": 217,
    "set_tid_address": 218,
    "fadvise64": 221,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "openat": 257,
    "newfstatat": 262,
    "readlinkat": 267,
    "faccessat": 269,
    "pselect6": 270,
    "ppoll": 271,
    "set_robust_list": 273,
    "dup3": 292,
    "getcpu": 309,
    "getrandom": 318,
    "statx": 332,
    "rseq": 334,
}
"""Calls that are allowed, whatever their arguments."""
_CLONE = 56
_TGKILL = 234
_PRLIMIT = 302
_CLONE_THREAD = 0x10000
_LAST_KNOWN = 334
"""C libraries try newer calls and fall back if there are none: those are not there (ENOSYS)."""

_SECCOMP = 317
_SET_MODE_FILTER = 1
_GET_ACTION_AVAIL = 2
_RET_KILL = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000
_AUDIT_ARCH_X86_64 = 0xC000003E

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_GREATER = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_NUMBER = 0  # offsets in struct seccomp_data
_ARCHITECTURE = 4
_ARGUMENTS = 16  # of 8 bytes each, the low half first


class _Instruction(ctypes.Structure):
    """``struct sock_filter``: a jump goes ``if_true`` or ``if_false`` instructions further."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    """``struct sock_fprog``, a filter and its length."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def seccomp_available() -> bool:
    """Whether this kernel and its container let a process filter its own system calls."""
    if platform.machine() != "x86_64":
        return False
    action = ctypes.c_uint32(_RET_ERRNO)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(_SECCOMP, _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)


def confine_system_calls() -> bool:
    """Refuse all system calls but those that decoding needs, in this process's later threads too.

    Privileges must have been forgone. A refused call fails with EPERM, and one that is newer than
    the list with ENOSYS; a call by another architecture's numbers ends the process.

    Returns:
        Whether the kernel enforces it.
    """
    if not seccomp_available():
        return False
    instructions = _filter()
    program = _Program(len(instructions), (_Instruction * len(instructions))(*instructions))
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return bool(syscall(_SECCOMP, _SET_MODE_FILTER, 0, ctypes.byref(program)) == 0)


def _filter() -> list[_Instruction]:
    """The program that the kernel runs at each system call."""
    allow = _Instruction(_RETURN, 0, 0, _RET_ALLOW)
    program = [
        _Instruction(_LOAD, 0, 0, _ARCHITECTURE),
        _Instruction(_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        _Instruction(_RETURN, 0, 0, _RET_KILL),
        _Instruction(_LOAD, 0, 0, _NUMBER),
        _Instruction(_GREATER, 0, 1, _LAST_KNOWN),
        _Instruction(_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
    ]
    for number in sorted(_CALLS.values()):
        program += [_Instruction(_EQUAL, 0, 1, number), allow]
    # A thread, and no process. (clone3, whose flags a filter cannot see, is newer than the list.)
    program += _if_all(_CLONE, {_ARGUMENTS: (_ANY_BIT, _CLONE_THREAD)})
    # A signal to the process itself, as abort() sends.
    program += _if_all(_TGKILL, {_ARGUMENTS: (_EQUAL, os.getpid())})
    # Limits are read: the pointer to new ones, the third argument, is null.
    new = _ARGUMENTS + 2 * 8
    program += _if_all(_PRLIMIT, {new: (_EQUAL, 0), new + 4: (_EQUAL, 0)})
    return [*program, _Instruction(_RETURN, 0, 0, _RET_ERRNO | errno.EPERM)]


def _if_all(number: int, tests: dict[int, tuple[int, int]]) -> list[_Instruction]:
    """Allow a call if each of its arguments' halves, by offset, passes a (code, value) test."""
    program = [_Instruction(_EQUAL, 0, 2 * len(tests) + 2, number)]
    for left, (offset, (code, value)) in zip(range(len(tests), 0, -1), tests.items(), strict=True):
        program.append(_Instruction(_LOAD, 0, 0, offset))
        program.append(_Instruction(code, 0, 2 * left - 1, value))
    return [
        *program,
        _Instruction(_RETURN, 0, 0, _RET_ALLOW),
        _Instruction(_RETURN, 0, 0, _RET_ERRNO | errno.EPERM),
    ]
